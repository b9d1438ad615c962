# `make test` and `make demo` need Python >= 3.10 (with venv), a C++ compiler and make; they set up .venv themselves.
#   make test [ARGS="-m 'not slurm'"]     linters, type checker, tests
#   make drills                           50 runs broken on purpose; docs/drills.md (20 minutes)
#   make demo [GENOMES=DIR] [GUE=DIR]     the whole path, on embedded data or on yours
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
.DELETE_ON_ERROR:
.PHONY: test lint drills demo clean

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

drills: $(READY)
	$(BIN)/python -m tests.drills --count 50 --out docs/drills.md

# The shell reads the two paths from its environment, so that spaces in them survive.
demo: export GENOMES := $(GENOMES)
demo: export GUE := $(GUE)
demo: $(READY)
	$(BIN)/python tests/demo.py $${GENOMES:+--genomes "$$GENOMES"} $${GUE:+--gue "$$GUE"}

# The stamp is written last: an interrupted installation is taken up again, a finished one costs nothing.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv (once; some minutes, most of them for torch)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

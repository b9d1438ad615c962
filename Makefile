# `make test` and `make demo` need Python >= 3.10 (with venv), a C++ compiler and make; they set up .venv themselves.
#   make test [ARGS="-m 'not slurm'"]     linters, type checker, tests, test-kernels
#   make test-kernels                     Triton kernels, interpreted and compiled, under the oldest and newest Triton
#   make drills                           50 runs broken on purpose; docs/drills.md (20 minutes)
#   make demo [GENOMES=DIR] [GUE=DIR]     the whole path, on embedded data or on yours
PYTHON ?= python3
BIN := .venv/bin
# Each in a folder of its own, which PYTHONPATH puts in front; where torch is a CPU build, all other tests run without Triton.
TRITONS := 3.6.0 3.9.0
READY := .venv/.ready
.DELETE_ON_ERROR:
.PHONY: test test-kernels lint drills demo clean

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)
	$(MAKE) --no-print-directory test-kernels

# The interpreter has to be asked for before Triton is imported, so these tests have processes of their own.
test-kernels: $(TRITONS:%=test-triton-%)
test-triton-%: .venv/triton-%/.ready
	PYTHONPATH=$(CURDIR)/.venv/triton-$* TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels/interpreted
	PYTHONPATH=$(CURDIR)/.venv/triton-$* $(BIN)/python -m pytest -n 2 tests/kernels/compiled

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

.SECONDARY: $(TRITONS:%=.venv/triton-%/.ready)
.venv/triton-%/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/triton-$* triton==$*
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

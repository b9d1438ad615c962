# `make test` and `make demo` need Python >= 3.10 (with venv), a C++ compiler and make; they set up .venv themselves.
#   make test [ARGS="-m 'not slurm'"]     linters, type checker, tests, test-kernels
#   make test-kernels                     Triton kernels, interpreted and compiled, under the oldest and newest Triton
#   make drills                           50 runs broken on purpose; docs/drills.md (20 minutes)
#   make demo [GENOMES=DIR] [GUE=DIR]     the whole path, on embedded data or on yours
#   make wheelhouse                       wheelhouse/, to install from without internet; docs/install.md
PYTHON ?= python3
BIN := .venv/bin
# Each in a folder of its own, which PYTHONPATH puts in front; where torch is a CPU build, all other tests run without Triton.
TRITONS := 3.6.0 3.9.0
READY := .venv/.ready
.DELETE_ON_ERROR:
.PHONY: test test-kernels lint drills demo wheelhouse clean

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
	$(BIN)/shellcheck --external-sources slurm/*.sh slurm/*.sbatch slurm/container/install.sh .ci/run

drills: $(READY)
	$(BIN)/python -m tests.drills --count 50 --out docs/drills.md

# The shell reads the two paths from its environment, so that spaces in them survive.
demo: export GENOMES := $(GENOMES)
demo: export GUE := $(GUE)
demo: $(READY)
	$(BIN)/python tests/demo.py $${GENOMES:+--genomes "$$GENOMES"} $${GUE:+--gue "$$GUE"}

# Collected and tried aside: what is called wheelhouse is whole. The trial takes nothing from elsewhere (no pip configuration)
# and nothing from the repository. DeepSpeed comes as source; its compiled operators would be bound to this machine's torch.
EXTRAS := remote,triton,test
PART := wheelhouse.part
wheelhouse:
	@echo "Collecting wheels for this Python, $(PYTHON), and trying them (minutes)"
	rm -rf $(PART) build
	$(PYTHON) -m venv $(PART)/trial
	DS_BUILD_OPS=0 $(PART)/trial/bin/python -m pip wheel --quiet --disable-pip-version-check -c constraints.txt \
		--wheel-dir $(PART) ".[$(EXTRAS)]" setuptools
	PIP_CONFIG_FILE=/dev/null $(PART)/trial/bin/python -m pip --isolated install --quiet --disable-pip-version-check \
		--no-index --find-links $(PART) "dnabert2-pretraining[$(EXTRAS)]"
	$(PART)/trial/bin/python -m pip check
	cd $(PART)/trial && bin/python -m data_prep --help >/dev/null && DS_ACCELERATOR=cpu bin/python -c "import deepspeed"
	rm -rf $(PART)/trial build wheelhouse
	mv $(PART) wheelhouse
	@du -sh wheelhouse
	@echo "Without internet, in a copy of the repository with wheelhouse/ in it:"
	@echo "python3 -m venv .venv && .venv/bin/python -m pip install --no-index --find-links wheelhouse 'dnabert2-pretraining[$(EXTRAS)]'"

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
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info wheelhouse wheelhouse.part

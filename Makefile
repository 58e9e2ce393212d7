# Everything sets itself up in .venv: `make demo` and `make test` work in a clean clone. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
PY := $(VENV)/bin/python

# What `make demo` runs, and what is passed to pytest and to the benchmark.
DEMO ?= circuit --task ioi
TESTS ?=
BENCH ?=

# Waiting threads sleep instead of spinning: on a loaded two-core machine spinning made a forward twenty times slower.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1
export NO_MKDOCS_2_WARNING := 1

BASE := $(VENV)/.base
DEV := $(VENV)/.dev

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types format docs docs-serve bench bench-peers studies clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BASE) ## find and prove the indirect-object circuit of a 135M model, and leave a report
	$(VENV)/bin/vesalius $(DEMO)

test: $(DEV) ## run the tests (TESTS="tests/tasks -k ioi" for some), a process a core and four at most
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile $(TESTS)

check: lint types docs test ## all that CI does

lint: $(DEV) ## style: ruff, formatting included
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(DEV) ## types: mypy, strict
	$(VENV)/bin/mypy

format: $(DEV) ## rewrite the sources as `make lint` wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(DEV) ## build the documentation into site/; warnings are errors
	$(VENV)/bin/mkdocs build --strict --quiet

docs-serve: $(DEV) ## read the documentation in a browser while writing it
	$(VENV)/bin/mkdocs serve

bench: $(DEV) ## time the bench against a plain hook loop, the trainer against a plain loop and Hugging Face's
	$(PY) -m bench.run $(BENCH)
	$(PY) -m bench.training
	$(PY) -m bench.optimizers
	$(PY) -m bench.heads
	$(PY) -m bench.lens
	$(PY) -m bench.changes --environments $(PEERS)

bench-peers: $(DEV) $(PEERS)/transformer-lens/.done $(PEERS)/nnsight/.done $(PEERS)/mergekit/.done ## time other libraries on the same work, each in its own environment
	$(PY) -m bench.peers --environments $(PEERS) $(BENCH)

studies: $(DEV) ## measure again everything docs/results/ states
	@set -e; for study in studies/[a-z]*.py; do \
		[ -e "$$study" ] || { echo "no studies/*.py yet"; break; }; echo "== $$study"; $(PY) "$$study"; done

clean: ## remove environments and everything built or measured (not the model cache)
	rm -rf $(VENV) $(PEERS) site bench/out .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Vesalius needs Python 3.11 or newer; this is {v.major}.{v.minor}. Try make PYTHON=python3.12")'
	@echo "Setting up $(VENV). The first time this fetches PyTorch and takes some minutes; later it takes none."
	$(PYTHON) -m venv $(VENV)

# The stamps are newer than what they were installed from, so that a second `make` installs nothing.
$(BASE): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --constraint constraints.txt --editable .
	@touch $@

$(DEV): $(BASE)
	$(PY) -m pip install --constraint constraints.txt --editable '.[test,docs,dev,bench]'
	@touch $@

$(PEERS)/%/.done: bench/peers/%.txt
	$(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/python -m pip install --requirement $<
	@touch $@

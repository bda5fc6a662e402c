# What a newcomer needs: `make train`, `make test`. Everything lands in .venv; nothing else on the machine changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: help train setup test test-cluster check format lint types bench torture image clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: $(VENV)/.installed ## set up if need be, then train (or resume) the tiny model; ARGS="key=value …"
	$(BIN)/moetrain train $(ARGS)

setup: $(VENV)/.installed-dev ## the virtual environment with everything for development

test: $(VENV)/.installed-dev ## the whole test suite, JOBS=2 files at once; ARGS="-k name" for a part
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-cluster: $(VENV)/.installed-dev ## runs on two hosts and a SLURM made for it, as root on Debian; else it skips
	tests/cluster/packages.sh
	$(BIN)/python -m pytest -m cluster -n $(JOBS) --dist loadfile $(ARGS)

check: lint types test ## all that CI checks

format: $(VENV)/.installed-dev ## put the code into the project's form
	$(BIN)/ruff format moetrain tests scripts
	$(BIN)/ruff check --fix moetrain tests scripts

lint: $(VENV)/.installed-dev ## form and common faults
	$(BIN)/ruff format --check moetrain tests scripts
	$(BIN)/ruff check moetrain tests scripts
	$(BIN)/hadolint docker/Dockerfile

types: $(VENV)/.installed-dev ## mypy --strict on the rooms without torch
	$(BIN)/mypy

bench: $(VENV)/.installed ## time the MoE layer against a dense block and others' layers; ARGS="key=value …"
	$(BIN)/moetrain bench layer $(ARGS)

torture: $(VENV)/.installed ## kill a small run at random moments, ROUNDS=100 times; hours on a busy machine
	$(BIN)/python scripts/torture.py --rounds $(or $(ROUNDS),100)

image: ## the container image
	docker build -f docker/Dockerfile -t moetrain .

clean: ## remove the virtual environment and caches; runs and prepared data stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "moetrain needs Python 3.10 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

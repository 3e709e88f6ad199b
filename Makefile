# `make help` lists the targets. PYTHON selects the interpreter of a new environment: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help env run test test-slow test-random faults lint format types check audit bench timings simulations soak wheel \
        board clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

env: $(BIN)/.ready ## create .venv with the package and its test dependencies

run: env ## train a ResNet18 on phantoms (the first command of the README)
	$(BIN)/python -m covid_cls.train backbone=resnet18 strategy=partial

test: env ## run the quick tests, which start no process
	$(BIN)/python -m pytest

test-slow: env ## run the slow tests, which start processes: signals, sweeps, wheels, notebooks
	$(BIN)/python -m pytest -m slow

test-random: env ## run the quick tests five times in random order while other processes use all cores
	$(BIN)/python -m tools.random_order

faults: env ## insert faults into a copy of the package; the quick tests must detect each
	$(BIN)/python -m tools.planted_faults

lint: env ## check with ruff, without changes
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: env ## format and fix with ruff
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

types: env ## check the types with mypy (strict)
	$(BIN)/python -m mypy

check: lint types test test-slow ## run all checks of CI

audit: env ## list known vulnerabilities of the packages in .venv
	$(BIN)/python .ci/audit.py

bench: env ## compare the training speed of a plain loop and of covid_cls
	$(BIN)/python -m covid_cls.benchmark backbone=resnet18 strategy=partial

timings: env ## measure the start of the commands, the quick tests, and .ci/run in a new clone
	$(BIN)/python -m tools.timings --suite --ci

simulations: env ## simulate interval coverage and type I error; docs/simulations.md has the output
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.simulations.intervals

soak: env ## inject kills, damaged files and bad images by the hundred; writes docs/soak.md (15 minutes)
	$(BIN)/python -m tools.soak --write

wheel: env ## build dist/*.whl
	$(BIN)/python -m build --wheel

board: env ## start TensorBoard for outputs/, on this machine only
	$(BIN)/tensorboard --logdir outputs

clean: ## remove caches and builds; keep outputs and .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

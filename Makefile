# make help lists the verbs. PYTHON chooses the interpreter of a new environment: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help env run test test-slow test-random faults lint format types check audit bench timings simulations soak wheel \
        board clean

help: ## list these verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

env: $(BIN)/.ready ## an environment in .venv with the package and what its tests need

run: env ## train a ResNet18 on drawn radiographs (the README's first command)
	$(BIN)/python -m covid_cls.train backbone=resnet18 strategy=partial

test: env ## the quick tier: every test that starts no process
	$(BIN)/python -m pytest

test-slow: env ## the tests that start processes: signals, sweeps, wheels, notebooks
	$(BIN)/python -m pytest -m slow

test-random: env ## the quick tier five times in random order, while another process keeps the cores busy
	$(BIN)/python -m tools.random_order

faults: env ## plant faults in a copy of the package; the quick tier must catch each
	$(BIN)/python -m tools.planted_faults

lint: env ## ruff, without changing anything
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: env ## let ruff rewrite what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

types: env ## mypy, strict
	$(BIN)/python -m mypy

check: lint types test test-slow ## what CI checks

audit: env ## known vulnerabilities of what is installed in .venv
	$(BIN)/python .ci/audit.py

bench: env ## how fast the plain loop and covid_cls train, in turn
	$(BIN)/python -m covid_cls.benchmark backbone=resnet18 strategy=partial

timings: env ## how long commands take to start, the quick tier and .ci/run in a fresh clone
	$(BIN)/python -m tools.timings --suite --ci

simulations: env ## coverage of the intervals and level of the tests; docs/simulations.md keeps the output
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.simulations.intervals

soak: env ## kills, damaged files and bad images by the hundred; docs/soak.md keeps the output (a quarter of an hour)
	$(BIN)/python -m tools.soak --write

wheel: env ## build dist/*.whl
	$(BIN)/python -m build --wheel

board: env ## TensorBoard over outputs, on this machine only
	$(BIN)/tensorboard --logdir outputs

clean: ## remove caches and builds; outputs and .venv stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

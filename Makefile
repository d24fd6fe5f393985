# Two commands: `make quickstart` trains, scores and uses a small model; `make test` lints and tests.
# Both make their virtual environment in .venv once and install again only when setup.cfg changes.

PYTHON ?= python3
BIN := .venv/bin
# Waiting threads sleep, so that another program on the machine does not slow torch down tenfold.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: quickstart test lint format clean

quickstart: .venv/installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $$($(BIN)/python -c "import os; print(os.cpu_count())") scripts/run_semseg.py examples/quickstart.yaml
	$(BIN)/python examples/segment_scene.py outputs/quickstart

test: .venv/installed-test lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(PYTEST_ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv outputs

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: setup.cfg .venv/bin/python
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-test: setup.cfg .venv/bin/python
	$(BIN)/pip install --quiet --editable ".[test]"
	touch .venv/installed $@

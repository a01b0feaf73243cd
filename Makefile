# Everything below sets itself up: a virtual environment in .venv, with the versions that constraints.txt pins.
# PYTHON chooses the interpreter it is made with (3.11 or later): make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An editable install also builds in an environment of its own: both variables hold it to the same pins.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
       $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint bench clean

help:
	@echo "make demo   train over loopback, server and client, for about two minutes"
	@echo "make test   run the tests"
	@echo "make lint   check style, imports and types"
	@echo "make bench  measure everything and write docs/results.md (most of an hour; BENCH='--quick' is shorter)"
	@echo "make clean  remove the virtual environment"

demo: $(VENV)/.plain
	$(BIN)/edge-client demo

# A process a core, each with whole files, for tests of one file share what it sets up.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run_all $(BENCH)

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  f"Isthmus needs Python 3.11 or later and this is {sys.version.split()[0]}: make ... PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# Each stamp is one set of extras, installed again when what it depends on changes.
$(VENV)/.plain: EXTRAS :=
$(VENV)/.dev: EXTRAS := [dev]
$(VENV)/.bench: EXTRAS := [dev,bench]
$(VENV)/.plain $(VENV)/.dev $(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing isthmus$(EXTRAS) into $(VENV): PyTorch is large, this takes some minutes the first time"
	$(PIP) -e '.$(EXTRAS)'
	@touch $@

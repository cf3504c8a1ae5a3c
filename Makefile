# Every target sets up .venv by itself; ARGS passes options through: make lecture ARGS="--profile full"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: lecture test slow bench docs check clean

lecture: $(VENV)/.lab
	$(BIN)/losslab lecture $(ARGS)

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(ARGS)

slow: $(VENV)/.dev
	$(BIN)/pytest -m slow $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

# docs/tickets.md from the folder of a finished lottery: make docs ARGS=FOLDER
docs: $(VENV)/.lab
	$(BIN)/python docs/tickets.py $(ARGS)

clean:
	rm -rf $(VENV) losslab-report losslab-run

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "losslab needs Python 3.11 or newer: set PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# One stamp a set of dependencies; a change of pyproject.toml or constraints.txt installs again.
$(VENV)/.lab: $(VENV)/bin/python pyproject.toml constraints.txt
	@$(BIN)/pip install -q -c constraints.txt $$(grep '^torch==' constraints.txt)
	@$(BIN)/pip install -q -c constraints.txt -e ".[data]"
	@touch $@

$(VENV)/.dev: $(VENV)/.lab
	@$(BIN)/pip install -q -c constraints.txt -e ".[data,dev]"
	@touch $@

$(VENV)/.bench: $(VENV)/.lab
	@$(BIN)/pip install -q -c constraints.txt -e ".[data,bench,fast]"
	@touch $@

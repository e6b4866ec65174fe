# Everything from a fresh clone: needs only python3 (3.10 or later) with pip and venv, and make.
#
#   make test         environment, linters, type checks, all tests (less: make test PYTEST_ARGS="-m 'not slow'")
#   make quickstart   environment, then the main job on an embedded model and text; results in runs/quickstart

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=
BENCHMARKS ?= $(sort $(wildcard benchmarks/*.py))

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := src tests examples benchmarks

.PHONY: test lint format quickstart bench clean

test: lint
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quickstart: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/quickstart $(QUICKSTART_ARGS)

bench: $(STAMP)
	for script in $(BENCHMARKS); do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

# The stamp is written last, so an installation that was cut off is taken up again by the next call.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Inlay needs Python 3.10 or later; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[dev,cli,quickstart]"
	touch $@

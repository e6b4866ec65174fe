# Everything from a fresh clone: needs only python3 (3.10 or later) with pip and venv, and make.
#
#   make test         environment, linters, type checks, all tests (less: make test PYTEST_ARGS="-m 'not slow'")
#   make test-oldest  the tests that touch transformers, with the oldest release of it that Inlay promises to work with
#   make quickstart   environment, then the main job on an embedded model and text; results in runs/quickstart

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=
BENCHMARKS ?= $(sort $(wildcard benchmarks/*.py))

OLDEST_VENV ?= .venv-oldest
OLDEST_TESTS := $(addprefix tests/,$(addsuffix .py,\
	test_prompts test_prompts_life test_prompts_training test_bottleneck_models test_composition_bottleneck \
	test_adapterhub test_trainer test_reft test_reft_positions peft_cross/test_prompts cli/test_methods_reached))

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST_BIN := $(OLDEST_VENV)/bin
OLDEST_STAMP := $(OLDEST_VENV)/.installed
PIP := python -m pip --disable-pip-version-check --quiet
SOURCES := src tests examples benchmarks

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Inlay needs Python 3.10 or later; name one: make PYTHON=python3.12")'
endef

.PHONY: test test-oldest lint format quickstart bench clean

test: lint
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-oldest: $(OLDEST_STAMP)
	$(OLDEST_BIN)/python -m pytest -n 2 -m "not slow" $(OLDEST_TESTS) $(PYTEST_ARGS)

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
	rm -rf $(VENV) $(OLDEST_VENV) .mypy_cache .pytest_cache .ruff_cache

# The stamp is written last, so an installation that was cut off is taken up again by the next call.
$(STAMP): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) install -c constraints.txt torch
	$(BIN)/$(PIP) install -c constraints.txt -e ".[dev,cli,quickstart]"
	touch $@

# The same constraints, but for the packages that constraints-oldest.txt names.
$(OLDEST_STAMP): pyproject.toml constraints.txt constraints-oldest.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(OLDEST_VENV)
	awk -F== 'NR == FNR { oldest[$$1]; print; next } !($$1 in oldest)' \
		constraints-oldest.txt constraints.txt > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_BIN)/$(PIP) install -c $(OLDEST_VENV)/constraints.txt torch
	$(OLDEST_BIN)/$(PIP) install -c $(OLDEST_VENV)/constraints.txt -e ".[dev,cli]"
	touch $@

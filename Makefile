# `make serve` and `make test` work on a fresh Linux machine with Python 3.11+ and make.
.DEFAULT_GOAL := help
PYTHON ?= python3
# gguf: the demo model is a GGUF file. With CUDA: make serve EXTRAS=gguf,cuda
EXTRAS ?= gguf
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed-$(EXTRAS)
DEV := $(VENV)/.installed-dev
MOONCAKE := $(VENV)/.mooncake
# Two workers: one runs the launches, the other one all else.
PYTEST := $(BIN)/python -m pytest -v --numprocesses 2 --no-loadscope-reorder
ARGS ?=
DIST ?= dist

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# $(call require_new,PYTHON,FIX): the shell command that refuses a Python that is missing or too old.
require_new = $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
  echo "error: pdlaunch needs Python 3.11 or newer; $(1) is $$($(1) -c 'import sys; print(sys.version.split()[0])' 2> /dev/null || echo missing)"; \
  echo "fix: $(2)make $(or $(MAKECMDGOALS),install) PYTHON=python3.11"; exit 1; } >&2

# pip comes last into an environment: where it is, the environment is whole.
$(BIN)/pip:
	@$(call require_new,$(PYTHON),)
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/pip
	@$(call require_new,$(BIN)/python,make clean; )
	@$(BIN)/python tools/install.py runtime '$(EXTRAS)'
	@touch $@

$(DEV): $(RUNTIME)
	@$(BIN)/python tools/install.py dev
	@touch $@

install: $(RUNTIME)  ## Create .venv, install pinned dependencies, fetch and convert the demo model (once)
	@$(BIN)/python -m pdlaunch.models.convert smollm2 --if-needed

serve: install  ## Serve the demo model on http://127.0.0.1:8000 (ARGS="--port 9000" passes flags on)
	@$(BIN)/python -m pdlaunch serve $(ARGS)

$(MOONCAKE): $(DEV)
	@$(BIN)/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('mooncake') is None)" \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	       --constraint constraints.txt mooncake-transfer-engine-non-cuda \
	  || echo "no wheel of Mooncake for this machine: its tests are skipped"
	touch $@

test: install $(DEV) $(MOONCAKE)  ## Run all tests (ARGS="-k name" passes options to pytest)
	$(PYTEST) $(ARGS)

test-fast: $(DEV)  ## Run the tests that start no process
	$(PYTEST) -m "not processes" $(ARGS)

coverage: install $(DEV) $(MOONCAKE)  ## Run all tests and show what they cover, child processes included
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -v --numprocesses 2 --no-loadscope-reorder $(ARGS); status=$$?; $(BIN)/coverage combine --quiet && \
	  $(BIN)/coverage report && exit $$status

soak: install $(DEV)  ## 6,000 requests under injected faults, cancels and kills (ARGS="--requests 500" for a shorter one)
	$(BIN)/python -m tests.e2e.reliability soak $(ARGS)

kills: install $(DEV)  ## kill -9 and SIGSTOP of processes under load: what the clients see, seconds to recovery
	$(BIN)/python -m tests.e2e.reliability kills $(ARGS)

cancels: install $(DEV)  ## 1,000 clients that go away at random moments; every block must come back
	$(BIN)/python -m tests.e2e.reliability cancels $(ARGS)

attack: install $(DEV)  ## Attack a deployment of its own as strangers would (ARGS="fuzz --requests 500" for one attack)
	$(BIN)/python -m tests.attacks $(ARGS)

lint: $(DEV)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)  ## Check types
	$(BIN)/mypy

format: $(DEV)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

rules: $(RUNTIME)  ## Write docs/rules.md from the registry of rules
	$(BIN)/pdlaunch explain --markdown > docs/rules.md

settings: $(RUNTIME)  ## Write docs/settings.md from the fields of the settings
	$(BIN)/pdlaunch config schema --markdown > docs/settings.md

# setuptools is there, as torch needs it; a build/ of before would bring modules that are gone.
wheel: $(RUNTIME)  ## Build dist/pdlaunch-VERSION-py3-none-any.whl
	@rm -rf build
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --wheel-dir $(DIST) .
	@ls $(DIST)/pdlaunch-*.whl

clean:  ## Remove .venv and caches of the tools (models and logs stay in ~/.cache/pdlaunch)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build dist *.egg-info

.PHONY: help install serve test test-fast coverage soak kills cancels attack lint types format rules \
  settings wheel clean

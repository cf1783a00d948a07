# `make serve` and `make test` work on a fresh Linux machine with Python 3.11+ and make.
.DEFAULT_GOAL := help
PYTHON ?= python3
# The demo model is a GGUF file.
EXTRAS ?= gguf
VENV := .venv
BIN := $(VENV)/bin
# The place of the environment, whose scripts do not work elsewhere.
PLACE := $(shell realpath -m $(VENV) | cksum | cut -d ' ' -f 1)
RUNTIME := $(VENV)/.installed-$(EXTRAS)-$(PLACE)
DEV := $(VENV)/.installed-dev
MOONCAKE := $(VENV)/.mooncake
# The tests start hundreds of processes: none is to compile the package, or pytest the tests, again.
unexport PYTHONDONTWRITEBYTECODE
# Three workers for two cores: one runs most launches, and many tests wait.
PYTEST := $(BIN)/python -m pytest -v --numprocesses 3 --no-loadscope-reorder
ARGS ?=
DIST ?= dist
VLLM_VERSIONS ?= 0.28.0 0.31.0 0.32.0
VLLM_INTERFACES ?= 0.24.0 0.33.0

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'
	@echo
	@echo 'ARGS passes flags on:     make serve ARGS="--port 9000"'
	@echo '                          make test ARGS="-k leases"'
	@echo 'PYTHON names another one: make serve PYTHON=python3.12'
	@echo 'EXTRAS, with CUDA:        make serve EXTRAS=gguf,cuda'

# $(call require_new,PYTHON,FIX): the shell command that refuses a Python that is missing or too old.
require_new = $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
  echo "error: pdlaunch needs Python 3.11 or newer; $(1) is $$($(1) -c 'import sys; print(sys.version.split()[0])' 2> /dev/null || echo missing)"; \
  echo "fix: $(2)make $(or $(MAKECMDGOALS),install) PYTHON=python3.11"; exit 1; } >&2

# pip comes last into an environment: where it is, the environment is whole. Two makes at once lock
# the Makefile.
$(BIN)/pip:
	@$(call require_new,$(PYTHON),)
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@flock Makefile sh -c 'test -e $@ || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }'

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/pip
	@$(call require_new,$(BIN)/python,make clean; )
	@$(BIN)/python tools/install.py runtime '$(EXTRAS)'
	@touch $@

$(DEV): $(RUNTIME)
	@$(BIN)/python tools/install.py dev
	@touch $@

install: $(RUNTIME)  ## Install into .venv, convert the demo model
	@$(BIN)/python -m pdlaunch.engine.models.convert smollm2 --if-needed

serve: install  ## Serve the demo model on port 8000
	@$(BIN)/python -m pdlaunch serve $(ARGS)

$(MOONCAKE): $(DEV)
	@$(BIN)/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('mooncake') is None)" \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	       --constraint constraints.txt mooncake-transfer-engine-non-cuda \
	  || echo "no wheel of Mooncake for this machine: its tests are skipped"
	touch $@

test: install $(DEV) $(MOONCAKE)  ## Run the tests, but for those below
	$(PYTEST) -m "not e2e_long and not vllm and not hosts and not prometheus and not ray and not slurm and not browser and not clients" $(ARGS)

test-long: install $(DEV) $(MOONCAKE)  ## Run the launches that take minutes
	$(PYTEST) -m e2e_long tests/e2e $(ARGS)

test-fast: $(DEV)  ## Run the tests that start no process
	$(PYTEST) -m "not processes" $(ARGS)

# Several hosts on this machine, each of namespaces; skipped where these are not permitted.
test-hosts: install $(DEV) $(MOONCAKE)  ## Run the tests with several hosts
	$(BIN)/python -m pytest -v -rs tests/netns $(ARGS)

coverage: install $(DEV) $(MOONCAKE)  ## Run all tests, show what they cover
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -v --numprocesses 2 --no-loadscope-reorder $(ARGS); status=$$?; $(BIN)/coverage combine --quiet && \
	  $(BIN)/coverage report && exit $$status

# What a program below cannot be installed for is skipped, by name.
test-vllm: install $(DEV)  ## Run the tests with real engines of vLLM
	-tests/vllm/install.sh .venv-vllm
	-PYTHON=$(BIN)/python tests/vllm/interface.sh .venv-vllm-interface $(VLLM_INTERFACES)
	$(BIN)/python -m pytest -v -rs tests/vllm $(ARGS)

# Each version has an environment of its own, of 4 GB.
test-vllm-versions: install $(DEV)  ## Run the tests of proven KV with each version of vLLM
	for version in $(VLLM_VERSIONS); do \
	  tests/vllm/install.sh .venv-vllm-$$version $$version && \
	  PDLAUNCH_TEST_VLLM=$(CURDIR)/.venv-vllm-$$version/bin/vllm \
	    $(BIN)/python -m pytest -v -rs tests/vllm/test_verified.py -m "not vllm_long" $(ARGS) || \
	    exit 1; \
	done

test-ray: install $(DEV)  ## Run the tests on a cluster of Ray
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt 'ray>=2.40'
	$(BIN)/python -m pytest -v -rs tests/ray $(ARGS)

# Debian: apt-get install slurmctld slurmd. Skipped where it is missing.
test-slurm: install $(DEV)  ## Run the tests with Slurm
	$(BIN)/python -m pytest -v tests/slurm $(ARGS)

test-browser: install $(DEV)  ## Run the tests of the page in Chromium
	-tests/browser/install.sh
	$(BIN)/python -m pytest -v -rs tests/browser $(ARGS)

test-prometheus: install $(DEV)  ## Run the tests with a real Prometheus
	-tests/prometheus/install.sh .venv-prometheus
	$(BIN)/python -m pytest -v -rs tests/prometheus $(ARGS)

test-clients: install $(DEV)  ## Run the tests with client libraries
	-tests/clients/install.sh .venv-clients
	$(BIN)/python -m pytest -v -rs tests/clients $(ARGS)

# ARGS="--engines 10,100": without the largest one.
scale: install  ## Measure the control plane with 1,000 engines
	$(BIN)/python -m benchmarks.control_plane $(ARGS)

# ARGS="--requests 500": a shorter one.
soak: install $(DEV)  ## Send 20,000 requests while faults happen
	$(BIN)/python -m benchmarks.reliability soak $(ARGS)

# kill -9 and SIGSTOP: what the clients see, seconds to recovery.
kills: install $(DEV)  ## Kill and stop processes under load
	$(BIN)/python -m benchmarks.reliability kills $(ARGS)

# Every block must come back.
cancels: install $(DEV)  ## Have 1,000 clients go away
	$(BIN)/python -m benchmarks.reliability cancels $(ARGS)

# ARGS="fuzz --requests 500": one attack.
attack: install $(DEV)  ## Attack a deployment as strangers would
	$(BIN)/python -m tests.attacks $(ARGS)

lint: $(DEV)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)  ## Check types
	$(BIN)/mypy

format: $(DEV)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

rules: $(RUNTIME)  ## Write docs/rules.md
	$(BIN)/python -m tools.pages rules > docs/rules.md

settings: $(RUNTIME)  ## Write docs/settings.md
	$(BIN)/python -m tools.pages settings > docs/settings.md

# setuptools is there, as torch needs it; a build/ of before would bring modules that are gone.
wheel: $(RUNTIME)  ## Build dist/pdlaunch-*.whl
	@rm -rf build
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --wheel-dir $(DIST) .
	@ls $(DIST)/pdlaunch-*.whl

# Models and logs stay in ~/.cache/pdlaunch.
clean:  ## Remove .venv, dist and the tools' caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build dist *.egg-info

.PHONY: help install serve test test-fast test-long test-hosts test-vllm test-vllm-versions test-ray test-slurm test-prometheus test-browser test-clients coverage scale soak kills cancels attack lint types format rules \
  settings wheel clean

# Everything a contributor needs. `make demo` and `make test` do all the setting up themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Touched when the installed packages match pyproject.toml; without it nothing below needs the network.
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.installed-test

# The tests start hundreds of processes: where this is set, each of them compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-cluster test check collected mutants simulation test-timely chaos test-setup test-setup-llama test-setup-container pictures bench bench-short bench-setup schema man clean python

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-22s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## Watch keepalive work, against a simulated LM Studio; Ctrl-C ends it
	@$(BIN)/keepalive demo

test: $(TESTABLE)  ## Check style and types, run every test (minutes; ends with what was skipped, why, and the slowest)
	@$(MAKE) --no-print-directory --jobs=2 check collected
	$(BIN)/pytest --numprocesses=auto --dist=loadgroup

check: $(TESTABLE)  ## Check style, types and who imports whom (seconds)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest --quiet tests/test_house.py

# Compiles every test once, beside the checks, before all workers would do it at the same time.
collected: $(TESTABLE)
	@$(BIN)/python -m compileall -q keepalive
	@$(BIN)/pytest --collect-only --quiet >/dev/null

mutants: $(TESTABLE)  ## Plant every fault in the core, one at a time, and see that its tests find it (minutes)
	@$(BIN)/python tests/mutants.py

simulation: $(TESTABLE)  ## A thousand hours of everything going wrong, for one daemon and for several as one (an hour; KEEPALIVE_HOURS, KEEPALIVE_SEED)
	KEEPALIVE_HOURS=$${KEEPALIVE_HOURS:-1000} $(BIN)/pytest --numprocesses=auto tests/keeper/test_simulation.py tests/cluster/test_simulation.py

test-timely: $(TESTABLE)  ## Run the tests that depend most on time 20 times, while busy loops take all cores
	@$(BIN)/python tests/kit/timely.py

demo-cluster: $(TESTABLE)  ## Two daemons as one on this machine, and what to kill; Ctrl-C ends it
	@$(BIN)/python tests/kit/demo_cluster.py

chaos: $(TESTABLE)  ## Kill, stop and cut off who acts of three daemons 500 times under traffic, and see that nothing is loaded twice (an hour)
	@$(BIN)/python tests/chaos.py

test-setup: python  ## Install the real inference servers that some tests skip without (more than 1 GB)
	$(PYTHON) -m tests.kit.installed transformers llama

test-setup-llama: python  ## Build llama-server, whose router some tests skip without (a C++ compiler; 10 minutes)
	$(PYTHON) -m tests.kit.installed router

test-setup-container: python  ## Make the small Debian that the container's test skips without (root, debootstrap, 400 MB)
	$(PYTHON) tests/kit/container.py install

bench: $(TESTABLE)  ## Measure what the daemon costs, beside its peers and what is wanted (half an hour)
	@missed=0; \
	$(BIN)/python benchmarks/proxy || missed=1; \
	$(BIN)/python benchmarks/idle.py || missed=1; \
	$(BIN)/python benchmarks/page.py || missed=1; \
	$(BIN)/python benchmarks/prompts.py || missed=1; \
	$(BIN)/python benchmarks/memory || missed=1; \
	$(BIN)/python benchmarks/cluster.py || missed=1; \
	exit $$missed

bench-short: $(TESTABLE)  ## The same in less than three minutes: whole products side by side
	@$(BIN)/python benchmarks/proxy --short

bench-setup: $(TESTABLE)  ## Install the peers that can be had as Python packages, in an environment of their own
	@$(BIN)/python benchmarks/proxy setup

schema: $(INSTALLED)  ## Write docs/config.schema.json anew, after a change of the config
	@$(BIN)/python -m keepalive.config > $(VENV)/schema
	@mv $(VENV)/schema docs/config.schema.json

man: $(INSTALLED)  ## Write docs/keepalive.1 anew, after a change of the command
	@$(BIN)/python -m keepalive.cli.manual > $(VENV)/man
	@mv $(VENV)/man docs/keepalive.1

pictures: $(TESTABLE)  ## Make the pictures in docs/ anew (Chromium; a minute)
	KEEPALIVE_SCREENSHOTS=1 $(BIN)/pytest --quiet tests/admin/test_page.py tests/cli/test_view.py -k 'a_day_with_its_troubles or picture'

clean:  ## Remove the environment and everything else that was generated
	rm -rf $(VENV) benchmarks/.peers .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TESTABLE): pyproject.toml
	@$(MAKE) --no-print-directory python
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(INSTALLED) $@

$(INSTALLED): pyproject.toml
	@$(MAKE) --no-print-directory python
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# Debian ships Python without the part that makes environments.
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'keepalive needs Python 3.11 or newer as "$(PYTHON)" (Debian, Ubuntu: apt install python3 python3-venv).'; \
		echo 'Another one: make PYTHON=python3.12'; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo '$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv).'; \
		exit 1; } >&2

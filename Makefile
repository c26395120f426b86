# `make` prints the commands.

HOST ?= 127.0.0.1
PORT ?= 8000
PYTHON ?= python3
BIN := .venv/bin
T ?= tests
RUNS ?= 1

.PHONY: help install run test faults check lint format lock bench

help:
	@echo "make run      serve on http://$(HOST):$(PORT), with SQLite unless DATABASE_URL is set"
	@echo "make test     checks, and the tests on SQLite and on a throwaway PostgreSQL; T=FILE runs some"
	@echo "make faults   PgBouncer, and failover of a real cluster under load, RUNS=N times (minutes; root, docker, nsenter, iptables)"
	@echo "make check    lint, types and layers"
	@echo "make lint     ruff"
	@echo "make format   ruff's formatter"
	@echo "make install  create .venv from the hashed lock"
	@echo "make bench    compare the speed with the tutorial's code and a hand-written one (docker and wrk)"
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

faults: install
	FAULTS=$(RUNS) $(BIN)/pytest tests/faults/test_pgbouncer.py tests/faults/test_failover.py

# Adds the packages that only the benchmark needs.
bench: install
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-bench.txt
	$(BIN)/python -m benchmarks $(BENCH)

UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" --upgrade

lock: install
	$(UV_COMPILE) pyproject.toml --output-file requirements.txt
	$(UV_COMPILE) pyproject.toml --group dev --constraint requirements.txt --output-file requirements-dev.txt
	$(UV_COMPILE) pyproject.toml --group bench --constraint requirements-dev.txt --output-file requirements-bench.txt

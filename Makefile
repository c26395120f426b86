# `make` alone says what there is.

HOST ?= 127.0.0.1
PORT ?= 8000
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install run test lock bench

help:
	@echo "make run      serve on http://$(HOST):$(PORT), on SQLite unless DATABASE_URL says otherwise"
	@echo "make test     every check: lint, types, floors, tests on SQLite and on a throwaway PostgreSQL"
	@echo "make install  make .venv from the hashed lock"
	@echo "make bench    this service, the tutorial's and a hand-written one side by side (docker and wrk)"
	@echo "make lock     resolve the dependencies anew into the hashed locks"

install: .venv/installed

# The environment is made anew when a lock changes, so that it never holds what the lock does not.
.venv/installed: requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

run: install
	$(BIN)/alembic upgrade head
	exec $(BIN)/uvicorn app.main:app --host $(HOST) --port $(PORT)

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml
	$(BIN)/pytest --numprocesses auto --dist loadfile

# What only the benchmark needs is installed beside the rest.
bench: install
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-bench.txt
	$(BIN)/python -m benchmarks $(BENCH)

UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" --upgrade

lock: install
	$(UV_COMPILE) pyproject.toml --output-file requirements.txt
	$(UV_COMPILE) pyproject.toml --group dev --constraint requirements.txt --output-file requirements-dev.txt
	$(UV_COMPILE) pyproject.toml --group bench --constraint requirements-dev.txt --output-file requirements-bench.txt

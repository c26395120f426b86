"""The schema of a database as text, for comparison."""

import re
import subprocess

from sqlalchemy import URL, create_engine, text

from tests.postgres import POSTGRES_BIN


def schema_of(url: URL) -> list[str]:
    """Return all statements of the schema, sorted, each with its columns sorted."""
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url)
        with engine.connect() as connection:
            master = connection.execute(text("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"))
            statements = [
                re.sub(r'CREATE TABLE "(\w+)"', r"CREATE TABLE \1", sql) for (sql,) in master
            ]
        engine.dispose()
    else:
        statements = _pg_dump(url).split(";\n")
    return sorted(_without_order(statement) for statement in statements if statement.strip())


def _pg_dump(url: URL) -> str:
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    dump = subprocess.run(
        [POSTGRES_BIN / "pg_dump", "--schema-only", "--no-owner", "--restrict-key=x", dsn],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return "\n".join(
        line for line in dump.splitlines() if not re.match(r"--|\\|SET |SELECT pg_catalog|$", line)
    )


def _without_order(statement: str) -> str:
    create, *lines = [line.strip().rstrip(",") for line in statement.strip().splitlines()]
    if create.startswith("CREATE TABLE"):
        lines.sort()
    return "\n".join([create, *lines])

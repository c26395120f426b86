"""The command `heroes`: import, export, sample rows and checks, directly with the database.

Exit codes: 0 success, 1 the rows or a file were refused, 2 wrong usage or settings, 3 the database
failed. `doctor` exits with 1 if it has findings, and with 2 if the database cannot be reached. Rows
and findings go to stdout, everything else to stderr.
"""

import gc
import gzip
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Annotated

import typer
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from app import NAME
from app.db.doctor import findings
from app.db.engine import is_foreign_key_violation, sqlstate
from app.db.revisions import Revisions
from app.errors import ImportRefused, SchemaBehind, WrongDatabase
from app.heroes import heroes, sample
from app.settings import from_environment, log_start
from app.transfer.copy import dump, load
from app.transfer.formats import Format, Row, encode_rows, read_numbered_rows, read_rows
from app.transfer.references import find_unknown_references

# `doctor` reads a whole table if it counts rows.
_DOCTOR_STATEMENT_SECONDS = 60
_BEHIND = "the schema is behind, run alembic upgrade head"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_FORMATS: dict[str, Format] = {".ndjson": "ndjson", ".jsonl": "ndjson", ".csv": "csv"}
_FILES = "*.ndjson or *.csv, or one of them with .gz, or - for the standard stream"
FormatOption = Annotated[
    Format | None,
    typer.Option("--format", help="The default depends on the file's name. For - it is ndjson."),
]


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help=_FILES)],
    file_format: FormatOption = None,
) -> None:
    """Create all heroes of FILE, or none if a line is wrong."""
    file_format = _format(file, file_format)
    with _errors_as_lines(file), _session() as session, _input(file) as (source, size):
        content = (heroes.create_model, source, file_format)
        gzipped = file.suffix == ".gz"
        rows = read_rows(*content, gzipped=gzipped)
        start = time.monotonic()
        try:
            with _progress(size) as report:
                position = source.tell if size else None
                count = load(session, heroes, _reported(rows, report, position))
        except DBAPIError as error:
            if not (size and is_foreign_key_violation(error.orig)):
                raise
            session.rollback()
            source.seek(0)
            numbered = read_numbered_rows(*content, gzipped=gzipped)
            if unknown := find_unknown_references(session, heroes, numbered):
                raise ImportRefused(unknown) from error
            raise
        session.commit()
        _summarize("Imported", count, start)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help=_FILES)],
    file_format: FormatOption = None,
) -> None:
    """Write all heroes to FILE: one snapshot, without secrets."""
    file_format = _format(file, file_format)
    with _errors_as_lines(file), _session() as session, _output(file) as out:
        start = time.monotonic()
        out.write(encode_rows((), heroes.names, file_format, header=True))
        count = 0
        with _progress(heroes.count(session, {})) as report:
            for more, lines in dump(session, heroes, file_format):
                out.write(lines)
                count += more
                report(count, count)
        out.flush()
        _summarize("Exported", count, start)


@app.command()
def seed(
    number: Annotated[int, typer.Argument(min=1, metavar="N")],
) -> None:
    """Create N sample heroes, the same ones each time."""
    with _errors_as_lines(), _session() as session:
        start = time.monotonic()
        with _progress(number) as report:
            count = load(session, heroes, _reported(sample(number), report))
        session.commit()
        _summarize("Created", count, start)


@app.command()
def doctor() -> None:
    """Check the revision, the schema, the data and the privileges: one line per finding."""
    found = False
    with (
        _errors_as_lines(database_failed=2),
        _engine(_DOCTOR_STATEMENT_SECONDS) as engine,
        Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session,
    ):
        for finding in findings(session):
            found = True
            typer.echo(finding)
    if found:
        raise typer.Exit(1)
    typer.echo("no findings")


def _format(file: Path, given: Format | None) -> Format:
    """Return the given format or that of the file's name. Raises `BadParameter` without either."""
    if given:
        return given
    if str(file) == "-":
        return "ndjson"
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if suffix not in _FORMATS:
        raise typer.BadParameter(
            f"the name {file.name} does not show the format", param_hint="--format"
        )
    return _FORMATS[suffix]


@contextmanager
def _errors_as_lines(file: Path | None = None, database_failed: int = 3) -> Iterator[None]:
    """End the command with one line per error, and its exit code."""
    code = database_failed
    try:
        yield
        return
    except ImportRefused as refused:
        code = 1
        for wrong in refused.errors:
            where = f"{file}:{wrong.line}" + (f": {wrong.field}" if wrong.field else "")
            typer.echo(f"{where}: {wrong.message}", err=True)
        typer.echo(f"{NAME}: nothing was imported", err=True)
    except BrokenPipeError:
        # The reader has closed the pipe. Without this, Python would report it again at exit.
        code = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        code = 1
        typer.echo(f"{NAME}: {file}: {error.strerror or error}", err=True)
    except WrongDatabase as error:
        typer.echo(f"{NAME}: {error}", err=True)
    except SchemaBehind as error:
        typer.echo(f"{NAME}: {_BEHIND}: {error}", err=True)
    except DBAPIError as error:
        if sqlstate(error.orig) in ("42P01", "42703"):
            typer.echo(f"{NAME}: {_BEHIND}", err=True)
        else:
            # Only the first line: the server's detail quotes the row, secrets included.
            reason = str(error.orig).splitlines()[0]
            typer.echo(f"{NAME}: the database failed: {reason}", err=True)
    raise typer.Exit(code)


@contextmanager
def _session() -> Iterator[Session]:
    """Yield a transaction on the service's database. Raises `SchemaBehind`."""
    with _engine() as engine, Session(engine) as session:
        Revisions.of_the_code().check(session)
        if engine.dialect.name == "postgresql":
            # The role's timeouts, if it has any, are for the service's calls.
            session.connection().exec_driver_sql(
                "SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0;"
                " SET LOCAL idle_in_transaction_session_timeout = 0"
            )
        else:
            session.connection().exec_driver_sql("PRAGMA foreign_keys = ON")
        # Excludes the objects loaded so far from garbage collection, which took half of an
        # export's time.
        gc.freeze()
        yield session


@contextmanager
def _engine(statement_seconds: int | None = None) -> Iterator[Engine]:
    """Yield an engine for the service's database, with a limit on the time of each statement.

    A limited statement waits for its lock no longer than a call of the service.
    """
    settings = from_environment()
    log_start(settings.database_url)
    postgresql: dict[str, str | int] = {
        "application_name": NAME,
        "client_encoding": "utf8",
        "connect_timeout": math.ceil(settings.database_timeout),
    }
    if statement_seconds:
        postgresql["options"] = (
            f"-c statement_timeout={statement_seconds}s"
            f" -c lock_timeout={math.ceil(settings.database_timeout * 1000)}"
        )
    url = settings.database_url
    is_sqlite = url.get_backend_name() == "sqlite"
    defaults = {"timeout": settings.database_timeout} if is_sqlite else postgresql
    engine = create_engine(
        url,
        hide_parameters=True,
        connect_args={name: value for name, value in defaults.items() if name not in url.query},
    )
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _input(file: Path) -> Iterator[tuple[IO[bytes], int | None]]:
    """Yield the file to read, and its size if it has one."""
    if str(file) == "-":
        yield sys.stdin.buffer, None
        return
    with file.open("rb") as source:
        yield source, file.stat().st_size or None


@contextmanager
def _output(file: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Yield the file to write. It appears under its name only when it is complete."""
    if str(file) == "-":
        yield sys.stdout.buffer
        return
    if file.exists() and not file.is_file():  # A pipe or a device.
        with file.open("wb") as out:
            yield out
        return
    with NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as part:
        try:
            if file.suffix == ".gz":
                with gzip.GzipFile(file.stem, "wb", compresslevel=6, fileobj=part) as out:
                    yield out
            else:
                yield part
            part.flush()
            Path(part.name).chmod(0o666 & ~_umask())
            Path(part.name).replace(file)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


_Report = Callable[[int, int], None]


@contextmanager
def _progress(length: int | None) -> Iterator[_Report]:
    """Yield a function that reports a number of rows and the position of them within `length`.

    It draws a bar on a terminal, and writes lines elsewhere.
    """
    terminal = sys.stderr.isatty()
    # Without a length the bar needs an endless iterable.
    endless = itertools.count() if length is None else None
    with typer.progressbar(endless, length, hidden=not terminal, file=sys.stderr) as bar:

        def report(count: int, position: int) -> None:
            bar.update(position - bar.pos)
            if not terminal and count % 100_000 == 0:
                typer.echo(f"{count} rows", err=True)

        yield report


def _reported(
    rows: Iterable[Row], report: _Report, position: Callable[[], int] | None = None
) -> Iterator[Row]:
    for count, row in enumerate(rows, 1):
        yield row
        if count % 1000 == 0:
            report(count, position() if position else count)


def _summarize(done: str, count: int, start: float) -> None:
    seconds = time.monotonic() - start
    rate = f"{count / seconds:,.0f} per second"
    typer.echo(f"{done} {count} rows in {seconds:.1f} s, {rate}", err=True)


def main() -> None:
    """Run the command: the entry point of `heroes` and `python -m app`."""
    app(prog_name=NAME)

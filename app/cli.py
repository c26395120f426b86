"""The command `heroes`: many heroes at once, straight into `DATABASE_URL` and out of it.

Exit codes: 0 done, 1 the heroes or a file were refused, 2 wrong usage or settings, 3 the database
failed. Heroes go to stdout, everything else to stderr.
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
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from app import heroes, transfer
from app.database import sqlstate
from app.errors import ImportRefused, SchemaBehind
from app.heroes import Listing
from app.revisions import Revisions
from app.settings import from_environment
from app.transfer import Format, NewHero

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_FORMATS: dict[str, Format] = {".ndjson": "ndjson", ".jsonl": "ndjson", ".csv": "csv"}
_FILES = "*.ndjson or *.csv, or one of them with .gz, or - for the standard stream"
FormatOption = Annotated[
    Format | None, typer.Option("--format", help="If the file's name does not say; - is ndjson.")
]


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help=_FILES)],
    file_format: FormatOption = None,
) -> None:
    """Create all heroes of FILE, or none of them when one is wrong."""
    file_format = _format(file, file_format)
    with _failures(file), _session() as session, _input(file) as (source, size):
        found = transfer.heroes_in(source, file_format, gzipped=file.suffix == ".gz")
        start = time.monotonic()
        with _progress(size) as tell:
            at = source.tell if size else None
            count = transfer.load(session, _told(found, tell, at))
        session.commit()
        _say("Imported", count, start)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help=_FILES)],
    file_format: FormatOption = None,
) -> None:
    """Write all heroes, as they are at one moment and without their secrets, to FILE."""
    file_format = _format(file, file_format)
    with _failures(file), _session() as session, _output(file) as out:
        start = time.monotonic()
        out.write(transfer.encode((), file_format, header=True))
        count = 0
        with _progress(heroes.count(session, Listing(0))) as tell:
            for more, lines in transfer.dump(session, file_format):
                out.write(lines)
                count += more
                tell(count, count)
        out.flush()
        _say("Exported", count, start)


@app.command()
def seed(
    number: Annotated[int, typer.Argument(min=1, metavar="N")],
) -> None:
    """Create N made-up heroes, the same ones each time."""
    with _failures(), _session() as session:
        start = time.monotonic()
        with _progress(number) as tell:
            count = transfer.load(session, _told(_made_up(number), tell))
        session.commit()
        _say("Created", count, start)


_FIRST = ("Captain", "Doctor", "Iron", "Lady", "Midnight", "Silver", "Star", "Young")
_SECOND = ("Comet", "Falcon", "Lantern", "Panther", "Raven", "Spider", "Storm", "Tarantula", "Wasp")


def _made_up(number: int) -> Iterator[NewHero]:
    for n in range(1, number + 1):
        name = f"{_FIRST[n % len(_FIRST)]} {_SECOND[n % len(_SECOND)]} {n}"
        age = None if n % 10 == 0 else 16 + n * 7 % 80
        yield {"name": name, "age": age, "secret_name": f"Secret {n}"}


def _format(file: Path, given: Format | None) -> Format:
    """What was given, or what the file's name says. Raises `BadParameter` where neither does."""
    if given:
        return given
    if str(file) == "-":
        return "ndjson"
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if suffix not in _FORMATS:
        raise typer.BadParameter(f"the name {file.name} does not say it", param_hint="--format")
    return _FORMATS[suffix]


@contextmanager
def _failures(file: Path | None = None) -> Iterator[None]:
    """Ends the command with a line for each thing that is wrong, and its exit code."""
    code = 3
    try:
        yield
        return
    except ImportRefused as refused:
        code = 1
        for wrong in refused.errors:
            where = f"{file}:{wrong.line}" + (f": {wrong.field}" if wrong.field else "")
            typer.echo(f"{where}: {wrong.message}", err=True)
        typer.echo("heroes: nothing was imported", err=True)
    except BrokenPipeError:
        # The reader has what it wants. Python would complain when it flushes stdout at its end.
        code = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        code = 1
        typer.echo(f"heroes: {file}: {error.strerror or error}", err=True)
    except SchemaBehind as error:
        typer.echo(f"heroes: the schema is behind, run alembic upgrade head: {error}", err=True)
    except DBAPIError as error:
        if sqlstate(error.orig) in ("42P01", "42703"):
            typer.echo("heroes: the schema is behind, run alembic upgrade head", err=True)
        else:
            # The first line alone: the server's detail quotes the row, secret name included.
            reason = str(error.orig).splitlines()[0]
            typer.echo(f"heroes: the database failed: {reason}", err=True)
    raise typer.Exit(code)


@contextmanager
def _session() -> Iterator[Session]:
    """A transaction on the service's database, whose schema is this code's."""
    settings = from_environment()
    postgresql = {
        "application_name": "heroes",
        "connect_timeout": math.ceil(settings.database_timeout),
    }
    is_sqlite = settings.database_url.get_backend_name() == "sqlite"
    engine = create_engine(
        settings.database_url,
        hide_parameters=True,
        connect_args={"timeout": settings.database_timeout} if is_sqlite else postgresql,
    )
    try:
        with Session(engine) as session:
            Revisions.of_the_code().check(session)
            # What is loaded stays: the garbage collector need not look through it again and again,
            # which was half of an export's time.
            gc.freeze()
            yield session
    finally:
        engine.dispose()


@contextmanager
def _input(file: Path) -> Iterator[tuple[IO[bytes], int | None]]:
    """The file to read, and its size where it has one."""
    if str(file) == "-":
        yield sys.stdin.buffer, None
        return
    with file.open("rb") as source:
        yield source, file.stat().st_size or None


@contextmanager
def _output(file: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The file to write, which is there when all of it is."""
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


_Tell = Callable[[int, int], None]


@contextmanager
def _progress(length: int | None) -> Iterator[_Tell]:
    """Tells of so many heroes, at this position of `length`: on a terminal a bar, else lines."""
    terminal = sys.stderr.isatty()
    # Without a length the bar has no end, as the iterable that it would otherwise go through.
    endless = itertools.count() if length is None else None
    with typer.progressbar(endless, length, hidden=not terminal, file=sys.stderr) as bar:

        def tell(count: int, position: int) -> None:
            bar.update(position - bar.pos)
            if not terminal and count % 100_000 == 0:
                typer.echo(f"{count} heroes", err=True)

        yield tell


def _told(
    new: Iterable[NewHero], tell: _Tell, position: Callable[[], int] | None = None
) -> Iterator[NewHero]:
    for count, hero in enumerate(new, 1):
        yield hero
        if count % 1000 == 0:
            tell(count, position() if position else count)


def _say(done: str, count: int, start: float) -> None:
    seconds = time.monotonic() - start
    rate = f"{count / seconds:,.0f} a second"
    typer.echo(f"{done} {count} heroes in {seconds:.1f} s, {rate}", err=True)


def main() -> None:
    """The entry point of `heroes` and `python -m app`."""
    app(prog_name="heroes")

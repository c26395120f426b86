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
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Thread

import httpx2
import psycopg
from sqlalchemy import make_url

from benchmarks.processes import tree
from benchmarks.servers import BIN, ROOT, WORKERS, Postgres, free_port, postgres, run, wait_for
from tests.faults.load import Load
from tests.processes import Gunicorn

HERE = Path(__file__).parent
ROWS = 100_000
CONNECTIONS = (32, 256)
SECONDS = 4
RESTARTS = 2
CRASHES = 3  # Of the service, and as many of PostgreSQL.
WRITERS = 32
HELD_SECONDS = 6
_WAITING = """
    SELECT 1 FROM pg_stat_activity
    WHERE wait_event_type = 'Lock' AND query ILIKE 'ALTER %' AND datname = current_database()
"""
_BEGIN, _END = "<!-- make compare writes this -->", "<!-- to here -->"


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
    bin: Path = BIN
    # The line of app/models.py after which a column is added. Empty: there are no migrations.
    columns_after: str = ""
    # The files with the code of the first table.
    code: tuple[str, ...] = ()
    token: str = ""

    def environ(self, folder: Path | None = None) -> dict[str, str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        return (
            os.environ | self.environment | {"PYTHONPATH": str(folder or self.folder), "PATH": path}
        )

    def run(self, command: str, folder: Path | None = None) -> tuple[int, str]:
        """Run a command of the project. Return its exit code and output."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder or self.folder,
            env=self.environ(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        return Postgres(self.database, 0, "").execute(statement)


def heroes(name: str, url: str, module: str) -> Project:
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
    )


def this_service(url: str) -> Project:
    project = heroes("this service", url, "")
    project.columns_after = '    """The public members of a hero that clients write."""\n'
    project.code = ("app/models.py", "app/heroes.py", "app/api/heroes.py", "app/application.py")
    return project


def tutorial(url: str) -> Project:
    project = heroes("the tutorial's code", url, "tests/tutorial.py")
    project.code = ("tests/tutorial.py",)
    return project


def template(url: str, backend: Path) -> Project:
    parts = urllib.parse.urlsplit(url)
    return Project(
        name="full-stack-fastapi-template",
        folder=backend,
        module="app/main.py",
        database=url,
        environment={
            "PROJECT_NAME": "comparison",
            "SECRET_KEY": "comparison" * 4,
            "FIRST_SUPERUSER": "admin@example.com",
            "FIRST_SUPERUSER_PASSWORD": "comparison",
            "POSTGRES_SERVER": str(parts.hostname),
            "POSTGRES_PORT": str(parts.port),
            "POSTGRES_USER": str(parts.username),
            "POSTGRES_PASSWORD": str(parts.password),
            "POSTGRES_DB": parts.path.strip("/"),
        },
        table="item",
        collection="/api/v1/items/",
        body='{"title": "%s"}',
        label="title",
        rows="(id, title, created_at, owner_id) SELECT gen_random_uuid(), 'Item ' || n, now(),"
        ' (SELECT id FROM "user" LIMIT 1)',
        bin=backend / ".venv" / "bin",
        columns_after="class ItemBase(SQLModel):\n",
        code=("app/models.py", "app/crud.py", "app/api/routes/items.py", "app/api/main.py"),
    )


class Server:
    """A project served by `fastapi run`, as in FastAPI's documentation and the template's image."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.project, self.folder = project, folder
        self.port = free_port()
        self.start()

    def start(self) -> None:
        command = ["fastapi", "run", "--workers", str(WORKERS), "--port", str(self.port)]
        with (self.folder / f"{self.port}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.project.bin / command[0], *command[1:], self.project.module],
                cwd=self.project.folder,
                env=self.project.environ(),
                stdout=log,
                stderr=log,
            )
        wait_for(self._responds, 60)

    def _responds(self) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/docs", timeout=5) as response:
            return bool(response.status == 200)

    @property
    def pid(self) -> int:
        return self._process.pid

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
        for pid in tree(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(10)


class RollingServer(Server):
    """This service in its production form."""

    def start(self) -> None:
        url = make_url(self.project.database).set(drivername="postgresql+psycopg")
        self._gunicorn = Gunicorn(url, self.folder, port=self.port)

    @property
    def pid(self) -> int:
        return self._gunicorn.pid

    def replace(self) -> None:
        """Replace the process without a gap: see docs/operations.md."""
        self._gunicorn.roll()

    def stop(self) -> None:
        self._gunicorn.stop()

    def kill(self) -> None:
        for pid in tree(self.pid):
            os.kill(pid, signal.SIGKILL)
        (self.folder / "gunicorn.pid").unlink()


@contextmanager
def running(project: Project, folder: Path) -> Iterator[Server]:
    server = (Server if project.module else RollingServer)(project, folder)
    try:
        yield server
    finally:
        server.stop()


def prepare(project: Project, folder: Path) -> None:
    """Migrate the database, fill the table, and log in to the template."""
    if project.folder == ROOT:
        run([BIN / "alembic", "upgrade", "head"], project.database)
    else:
        code, output = project.run("alembic upgrade head && python app/initial_data.py")
        assert code == 0, output
    project.execute(f"INSERT INTO {project.table} {project.rows} FROM generate_series(1, {ROWS}) n")
    project.execute(f"VACUUM ANALYZE {project.table}")
    ids = project.execute(f"SELECT id FROM {project.table}")
    (folder / f"{project.table}.ids").write_text("".join(f"{id_}\n" for (id_,) in ids))
    if project.table == "item":
        with running(project, folder) as server:
            login = {
                "username": project.environment["FIRST_SUPERUSER"],
                "password": project.environment["FIRST_SUPERUSER_PASSWORD"],
            }
            response = httpx2.post(
                f"http://127.0.0.1:{server.port}/api/v1/login/access-token", data=login
            )
            project.token = f"Bearer {response.json()['access_token']}"


def rate(project: Project, folder: Path, operation: str, connections: int) -> float:
    """Successful requests per second in a fresh process, after a warm-up with few connections."""
    environment = os.environ | {
        "OPERATION": operation,
        "COLLECTION": project.collection,
        "IDS": str(folder / f"{project.table}.ids"),
        "BODY": project.body % "Deadpond",
        "TOKEN": project.token,
    }
    with running(project, folder) as server:
        for seconds, count in ((1, 4), (SECONDS, connections)):
            done = subprocess.run(
                [
                    *("wrk", "--threads", "2", "--connections", str(count)),
                    *("--duration", f"{seconds}s", "--timeout", "10s"),
                    *("--script", HERE / "comparison.lua", f"http://127.0.0.1:{server.port}"),
                ],
                check=True,
                capture_output=True,
                text=True,
                env=environment,
            )
    return float(done.stdout.splitlines()[-1])


def load(project: Project, folder: Path, port: int) -> Load:
    """Reads and creates of 20 clients, which never send a request again."""
    first = (folder / f"{project.table}.ids").read_text().split()[0]
    requests = [
        ("GET", project.collection + first, ""),
        ("POST", project.collection, project.body % "Deadpond"),
    ]
    authorization = f"Authorization: {project.token}\r\n" if project.token else ""
    return Load(port, requests, headers=authorization)


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


def crashes(project: Project, folder: Path, database: Postgres) -> tuple[str, str]:
    """Acknowledged writes that are not stored, and writes that retries stored twice."""
    with running(project, folder) as server:

        def crash() -> None:
            for _ in range(CRASHES):
                time.sleep(1.5)
                server.kill()
                server.start()
                time.sleep(1.5)
                # PostgreSQL recovers like after a crash when one of its processes is killed.
                backends = project.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                )
                assert backends
                os.kill(tree(database.pid)[-1], signal.SIGKILL)
                wait_for(lambda: bool(psycopg.connect(project.database)), 60)
                time.sleep(1.5)
            stop.append(True)

        stop: list[bool] = []

        async def both() -> set[str]:
            written, _ = await asyncio.gather(
                write(project, server.port, stop), asyncio.to_thread(crash)
            )
            return written

        written = asyncio.run(both())
    found = Counter(
        name for (name,) in project.execute(f"SELECT {project.label} FROM {project.table}")
    )
    lost = [name for name in written if not found[name]]
    twice = [name for name in written if found[name] > 1]
    return f"{len(lost)} of {len(written):,}", f"{len(twice)} of {len(written):,}"


def copied(project: Project, folder: Path) -> Path:
    """Return a copy of the project's code, to change it."""
    copy = folder / f"next-{project.table}"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "node_modules", "*.db")
    shutil.copytree(project.folder, copy, ignore=ignored)
    return copy


def upgrade(project: Project, folder: Path, copy: Path, column: str) -> tuple[int, str, Load]:
    """Add a column to the copy and the database the documented way, under load.

    The previous release serves. A transaction that has read the table, like a report or a backup,
    stays open for some seconds after the migration begins to wait for it. Return alembic's exit
    code, its output, and the clients.
    """
    models = copy / "app" / "models.py"
    source = models.read_text()
    assert source.count(project.columns_after) == 1
    added = f"{project.columns_after}    {column}\n"
    models.write_text(source.replace(project.columns_after, added))
    code, output = project.run("alembic revision --autogenerate -m Column", copy)
    assert code == 0, output
    with running(project, folder) as server:
        clients = load(project, folder, server.port)
        with clients.running(), psycopg.connect(project.database) as holder:
            time.sleep(1)
            holder.execute(f"SELECT id FROM {project.table} LIMIT 1")

            def hold() -> None:
                try:
                    wait_for(lambda: bool(project.execute(_WAITING)), 60)
                    time.sleep(HELD_SECONDS)
                finally:
                    holder.rollback()

            holding = Thread(target=hold)
            holding.start()
            code, output = project.run("alembic upgrade head", copy)
            holding.join()
            time.sleep(1)
    return code, output, clients


def lines(project: Project) -> str:
    """Lines of code of the first table, without blank lines, migrations and tests.

    These are all lines of a file that is named for it, and in other files the definitions that
    are named for it and single lines that contain its name.
    """
    total = 0
    for path in project.code:
        rows = (project.folder / path).read_text().lower().splitlines()
        counted = {number for number, row in enumerate(rows, 1) if project.table in row}
        if project.table in Path(path).stem:
            counted.update(range(1, len(rows) + 1))
        for node in ast.parse("\n".join(rows)).body:
            if project.table in getattr(node, "name", ""):
                counted.update(range(node.lineno, (node.end_lineno or 0) + 1))
        total += sum(bool(rows[number - 1].strip()) for number in counted)
    return str(total)


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
        for column, kind in (
            ("power: str | None = None", "nullable column"),
            ("level: int = 1", "required column with a default"),
        ):
            stalled = f"slowest request, in seconds, while a {kind} is added"
            failed = f"requests of the previous release that fail while and after a {kind} is added"
            if copy is None:
                add(stalled, "no migrations")
                add(failed, "no migrations")
                continue
            code, output, clients = upgrade(project, folder, copy, column)
            if code:
                print(output)
            add(stalled, f"{clients.slowest:.1f}")
            add(failed, "the migration fails" if code else lost(clients))
        add("lines of code for one table and its routes", lines(project))
    return rows


def lost(clients: Load) -> str:
    return f"{len(clients.lost):,} of {len(clients.lost) + clients.answered:,}"


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
            database.execute(f"CREATE DATABASE {project.database.rpartition('/')[2]}")
            prepare(project, folder)
        rows = measure(projects, folder, database, options.rounds)
    header = ["", *(project.name for project in projects)]
    table = [header, ["---"] * len(header), *([title, *cells] for title, cells in rows.items())]
    text = "".join(f"| {' | '.join(line)} |\n" for line in table)
    print(text)
    if options.template:
        readme = ROOT / "README.md"
        before, _, rest = readme.read_text().partition(_BEGIN)
        _, _, after = rest.partition(_END)
        readme.write_text(f"{before}{_BEGIN}\n{text}{_END}{after}")


main()

"""Full file systems, many worker restarts, and slow clients of imports and exports."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import URL, Engine, text

from app.api.spools import MAX_SPOOLS
from tests.faults.load import Load
from tests.migrations import copy_project
from tests.processes import Gunicorn, gunicorn
from tests.service import ROOT, Connection, Service, http_client, serve, settings

NDJSON = {"Content-Type": "application/x-ndjson"}
LINE = b'{"name": "%s", "secret_name": "%s"}\n' % (b"n" * 200, b"s" * 200)
HEAD = (
    b"POST /heroes/import HTTP/1.1\r\nHost: heroes\r\nContent-Type: application/x-ndjson\r\n"
    b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

CHUNK = b"%x\r\n%s\r\n" % (len(LINE), LINE)
DISK_BYTES = 2 * 1024**2

Series = dict[tuple[str, ...], float]


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system in memory, like `/dev/shm`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = f"size={DISK_BYTES},nr_inodes=100"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount"):
        pytest.skip("needs the program mount")
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    """Use the free space of the file system up to the last byte."""
    with (disk / "fill").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def use_all_inodes(disk: Path) -> None:
    """Create empty files until the file system has no place for another one."""
    with contextlib.suppress(OSError):
        for number in range(1000):
            (disk / f"empty-{number}").touch()


def free(disk: Path) -> None:
    (disk / "fill").unlink()


def changed_project(folder: Path, file: str, old: str, new: str) -> Path:
    """Return a copy of the project in which one file differs."""
    project = copy_project(folder)
    shutil.copy(ROOT / "gunicorn.conf.py", project)
    source = (project / file).read_text()
    assert old in source
    (project / file).write_text(source.replace(old, new))
    return project


def counters(server: Gunicorn) -> Series:
    """Return the counters and the parts of the histograms."""
    response = server.get("/metrics")
    assert response.status == 200
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): (
            sample.value
        )
        for family in text_string_to_metric_families(response.body.decode())
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


LISTS = (
    "http_server_request_duration_seconds_count",
    *("http_request_method=GET", "http_response_status_code=200", "http_route=/heroes/"),
)


def restart_workers(server: Gunicorn, signum: int, while_waiting: Callable[[], object]) -> None:
    """End all workers at the same time and wait for the next ones."""
    workers = server.children
    for worker in workers:
        os.kill(worker, signum)
    server.started += len(workers)

    def have_started() -> bool:
        while_waiting()
        return sum("startup complete" in line for line in server.lines) >= server.started

    server.wait_for(have_started)


def request_many_series(server: Gunicorn) -> None:
    """Send requests whose series need more than the first blocks of a file."""
    for method, path, status in (
        *(("GET", "/heroes/", 200), ("GET", "/heroes/1", 404), ("DELETE", "/heroes/1", 404)),
        *(("GET", "/heroes/x", 422), ("PATCH", "/heroes/1", 422), ("POST", "/heroes/", 422)),
        *(("GET", "/health/live", 200), ("GET", "/villains", 404), ("PUT", "/heroes/1", 405)),
    ):
        with Connection(server.port) as connection:
            assert connection.send(method, path).status == status


@contextlib.contextmanager
def gunicorn_on(
    disk: Path, database_url: URL, folder: Path, workers: int, root: Path = ROOT
) -> Iterator[Gunicorn]:
    """Run the service with its metrics and heartbeats on the disk."""
    with gunicorn(
        database_url,
        folder,
        *("--worker-tmp-dir", str(disk)),
        root=root,
        PROMETHEUS_MULTIPROC_DIR=str(disk),
        WEB_CONCURRENCY=str(workers),
    ) as server:
        yield server


def test_a_full_disk_costs_metrics_and_no_requests(
    database_url: URL, tmp_path: Path, disk: Path
) -> None:
    fill(disk)
    with gunicorn_on(disk, database_url, tmp_path, workers=1) as server:
        for _ in range(5):
            assert server.get("/heroes/").status == 200
        assert counters(server) == {}
        assert any(
            line["level"] == "WARNING" and line["message"].startswith("Metrics are incomplete: ")
            for line in server.log
        )
        # The values are in the memory of the worker, and get into its files when there is space.
        free(disk)
        assert server.get("/heroes/").status == 200
        assert counters(server)[LISTS] == 6

        fill(disk)
        workers = server.children
        request_many_series(server)
        assert server.children == workers
        restart_workers(server, signal.SIGKILL, lambda: fill(disk))
        request_many_series(server)
        assert counters(server)[LISTS] == 8
        assert not any("SIGBUS" in line for line in server.lines)


def test_workers_start_without_a_free_inode_for_their_heartbeat(
    database_url: URL, tmp_path: Path, disk: Path
) -> None:
    with gunicorn_on(disk, database_url, tmp_path, workers=1) as server:
        use_all_inodes(disk)
        os.kill(server.pid, signal.SIGTTIN)  # An ended worker would free its inode.
        server.wait_for_workers(1)
        assert server.get("/heroes/").status == 200
        assert any("No heartbeat file in" in line["message"] for line in server.log)


def test_without_allocated_blocks_a_full_disk_ends_workers(
    database_url: URL, tmp_path: Path, disk: Path
) -> None:
    """The control for the previous test."""
    own = "    values.MmapedDict = MetricFile  # type: ignore[assignment, attr-defined]\n"
    project = changed_project(tmp_path, "app/telemetry/metric_files.py", own, "")
    with gunicorn_on(disk, database_url, tmp_path, workers=1, root=project) as server:

        def has_ended() -> bool:
            os.kill(server.children[0], signal.SIGKILL)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:  # The next worker needs its blocks within milliseconds.
                fill(disk)
            return any("SIGBUS" in line for line in server.lines)

        server.wait_for(has_ended)
        os.kill(server.pid, signal.SIGKILL)


def test_worker_restarts_under_load_lose_no_count_and_add_no_files(
    database_url: URL, tmp_path: Path, disk: Path
) -> None:
    with gunicorn_on(disk, database_url, tmp_path, workers=2) as server:
        latest = counters(server)

        def check_monotonic() -> None:
            nonlocal latest
            before, latest = latest, counters(server)
            assert all(latest[key] >= value for key, value in before.items())

        with Load(server.port, keep_alive_clients=4).running() as load:
            for _ in range(2):
                restart_workers(server, signal.SIGTERM, check_monotonic)
        assert load.lost == []
        assert load.answered > 100
        assert counters(server)[LISTS] == load.answered

        restart_workers(server, signal.SIGKILL, lambda: None)
        used = shutil.disk_usage(disk).used
        os.kill(server.pid, signal.SIGHUP)  # The old and the new workers run at the same time.
        server.wait_for_workers(2)
        server.wait_for(lambda: len(server.children) == 2)
        assert server.get("/heroes/").status == 200
        assert counters(server)[LISTS] == load.answered + 1
        assert shutil.disk_usage(disk).used <= 2 * used
        numbers = {file.stem.rpartition("_")[2] for file in disk.glob("*/*.db")}
        assert numbers <= {"1", "2", "3", "4"}


def test_files_per_process_grow_with_each_restart(
    database_url: URL, tmp_path: Path, disk: Path
) -> None:
    """The control for the previous test."""
    own, per_process = "metric_files.use(worker.number)", "metric_files.use(os.getpid())"
    project = changed_project(tmp_path, "gunicorn.conf.py", own, per_process)
    with gunicorn_on(disk, database_url, tmp_path, workers=2, root=project) as server:
        used = shutil.disk_usage(disk).used
        restart_workers(server, signal.SIGKILL, lambda: None)
        assert len(list(disk.glob("*/histogram_*.db"))) == 4
        assert shutil.disk_usage(disk).used >= 2 * used


def test_the_service_starts_without_a_folder_for_metrics(database_url: URL, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with gunicorn(
        database_url, tmp_path, PROMETHEUS_MULTIPROC_DIR=missing, WEB_CONCURRENCY="1"
    ) as server:
        restart_workers(server, signal.SIGKILL, lambda: None)
        assert server.get("/heroes/").status == 200
        assert counters(server)[LISTS] == 1
        assert any("Metrics are incomplete" in line["message"] for line in server.log)


def upload(client: httpx2.Client, size: int, **headers: str) -> httpx2.Response:
    """Import valid lines with so many bytes, the last one with more spaces."""
    body = LINE * (size // len(LINE))
    body = body[:-1] + b" " * (size - len(body)) + b"\n"
    return client.post("/heroes/import", content=body, headers=NDJSON | headers)


def export(port: int, version: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        plain.sendall(
            b"GET /heroes/export HTTP/%s\r\nHost: heroes\r\nConnection: close\r\n\r\n"
            % version.encode()
        )
        return b"".join(iter(lambda: plain.recv(65536), b""))


def test_imports_and_stored_exports_without_space_are_507(
    database_url: URL, database: Engine, tmp_path: Path, disk: Path
) -> None:
    with (
        gunicorn(database_url, tmp_path, TMPDIR=str(disk), WEB_CONCURRENCY="1") as server,
        http_client(server.port, timeout=20) as client,
    ):
        # The control: this body has space, and so it has after each refused one.
        assert upload(client, DISK_BYTES).status_code == 200
        for more in (1, 5000, DISK_BYTES):  # The first one fails only when the file is flushed.
            response = upload(client, DISK_BYTES + more)
            assert response.status_code == 507, more
            assert response.json() == {"detail": "There is no space to store the data"}
            assert upload(client, DISK_BYTES).status_code == 200
        problem = upload(client, 2 * DISK_BYTES, Accept="application/problem+json").json()
        assert (problem["title"], problem["status"]) == ("Insufficient Storage", 507)
        with database.connect() as connection:
            count = connection.execute(text("SELECT count(*) FROM hero")).scalar_one()
        assert count == 4 * (DISK_BYTES // len(LINE))

        assert b" 507 " in export(server.port, "1.0").splitlines()[0]
        # The control: HTTP/1.1 needs no file.
        fill(disk)
        streamed = export(server.port, "1.1")
        assert b" 200 " in streamed.splitlines()[0]
        assert len(streamed) > DISK_BYTES


@contextlib.contextmanager
def slow_import(port: int) -> Iterator[socket.socket]:
    """An import whose body does not end."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        plain.sendall(HEAD)
        # Sent when the service starts to read the body.
        assert plain.recv(len(CONTINUE), socket.MSG_WAITALL) == CONTINUE
        plain.sendall(CHUNK)
        yield plain


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_too_many_imports_at_the_same_time_are_503(service: Service) -> None:
    with service.client() as client, contextlib.ExitStack() as stack:
        for number in range(MAX_SPOOLS):
            assert upload(client, 1000).status_code == 200, number
            stack.enter_context(slow_import(service.port))
        response = upload(client, 1000)
        assert response.status_code == 503
        assert response.json() == {"detail": "Too many imports and exports are in progress"}
        assert response.headers["Retry-After"] == "10"
        assert client.get("/heroes/").status_code == 200
        assert client.get("/heroes/export").status_code == 200
        stack.close()
        until(lambda: upload(client, 1000).status_code == 200)


def test_an_import_that_does_not_end_is_408_and_releases_its_file(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service.client() as client, contextlib.ExitStack() as stack:
        # The control: the same client is served if it ends in time.
        with slow_import(service.port) as plain:
            time.sleep(1)
            plain.sendall(b"0\r\n\r\n")
            assert plain.recv(65536).startswith(b"HTTP/1.1 200 ")
        monkeypatch.setattr("app.api.bulk.SPOOL_TIMEOUT_SECONDS", 1)
        slow = [stack.enter_context(slow_import(service.port)) for _ in range(MAX_SPOOLS)]
        assert upload(client, 1000).status_code == 503
        for plain in slow:
            response = b"".join(iter(lambda plain=plain: plain.recv(65536), b""))  # type: ignore[misc]
            assert response.startswith(b"HTTP/1.1 408 ")
            assert b"\r\nconnection: close\r\n" in response
            assert response.endswith(b'{"detail":"The body took longer than 1 seconds"}')
        assert upload(client, 1000).status_code == 200


def test_a_stored_export_that_a_client_does_not_read_is_aborted(
    database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with serve(settings(database_url), fd=listener.fileno()):
            port = listener.getsockname()[1]
            with http_client(port, timeout=20) as client:
                assert upload(client, 2 * DISK_BYTES).status_code == 200

            def export(pause: float) -> tuple[int, int]:
                """Return the announced and the received number of bytes."""
                with socket.socket() as plain:
                    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    plain.connect(("127.0.0.1", port))
                    plain.sendall(b"GET /heroes/export HTTP/1.0\r\n\r\n")
                    response = plain.recv(4096)
                    time.sleep(pause)
                    with contextlib.suppress(ConnectionResetError):
                        while part := plain.recv(2**20):
                            response += part
                head, _, body = response.partition(b"\r\n\r\n")
                return int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]), len(body)

            announced, received = export(1.5)  # The control.
            assert announced == received
            monkeypatch.setattr("app.api.spools.SPOOL_TIMEOUT_SECONDS", 0.5)
            announced, received = export(1.5)
            assert announced > received

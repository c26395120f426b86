"""Full file systems and many worker restarts."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import URL

from tests.faults.load import Load
from tests.service import (
    ROOT,
    Connection,
    Gunicorn,
    copy_project,
    gunicorn,
)

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
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if (
        not shutil.which("mount")
        or (error := subprocess.run(mount, capture_output=True)).returncode
    ):
        pytest.skip(f"needs the right to mount a tmpfs: {error.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    """Use the free space of the file system up to the last byte."""
    with (disk / "fill").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


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


def test_without_allocated_blocks_a_full_disk_ends_workers(
    database_url: URL, tmp_path: Path, disk: Path
) -> None:
    """The control for the previous test."""
    own = "    values.MmapedDict = MetricFile  # type: ignore[assignment, attr-defined]\n"
    project = changed_project(tmp_path, "app/telemetry/metric_files.py", own, "")
    with gunicorn_on(disk, database_url, tmp_path, workers=1, root=project) as server:
        os.kill(server.children[0], signal.SIGKILL)

        def has_ended() -> bool:
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

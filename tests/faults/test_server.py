"""The production server: stops, rolling restarts and killed workers lose no request."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import URL, Engine, text

from app.application import create_app
from app.db.revisions import Revisions
from app.server.protocol import BoundedProtocol
from app.server.worker import DrainingServer
from tests.faults.load import Load
from tests.postgres import Postgres
from tests.processes import Gunicorn, alive, gunicorn
from tests.service import ROOT, Connection, serve, settings

JSON = "application/json"
HERO = b'{"name": "Deadpond", "secret_name": "Dive Wilson"}'
ROLLING_RESTARTS = 5
HEAD_REVISION = Revisions.of_the_code().head


@pytest.fixture
def backend() -> str:
    return "postgresql"


@pytest.fixture
def server(database_url: URL, tmp_path: Path) -> Iterator[Gunicorn]:
    with gunicorn(database_url, tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def standing_server(
    postgres: Postgres, templates: dict[str, URL], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gunicorn]:
    """One server for all tests that do not change it."""
    name = f"heroes_server_{uuid.uuid4().hex}"
    url = postgres.create(name, str(templates["postgresql"].database))
    folder = tmp_path_factory.mktemp("server")
    with gunicorn(url, folder, KEEP_ALIVE_SECONDS="3") as server:
        yield server
    postgres.drop(name)


def send_raw(port: int, data: bytes) -> bytes:
    """Send the bytes; return the response up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        response = b""
        try:
            plain.sendall(data)
            while chunk := plain.recv(65536):
                response += chunk
        except OSError:
            pass
        return response


def metrics(server: Gunicorn) -> dict[tuple[str, ...], float]:
    exposition = server.get("/metrics").body.decode()
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def test_rolling_restarts_under_load_lose_no_request(server: Gunicorn, figures: list[str]) -> None:
    with Load(server.port).running() as load:
        for _ in range(ROLLING_RESTARTS):
            server.roll()
    total = load.answered + len(load.lost)
    figures.append(
        f"{ROLLING_RESTARTS} rolling restarts, draining: {len(load.lost)} of {total} requests lost,"
        f" the slowest took {load.slowest:.2f} s"
    )
    assert load.answered > 1000
    assert load.lost == []
    assert load.slowest < 5


def test_the_stock_worker_loses_requests_in_rolling_restarts(
    database_url: URL, tmp_path: Path, figures: list[str]
) -> None:
    """The control for the previous test: the load does detect lost requests."""
    stock = ("--worker-class", "uvicorn_worker.UvicornWorker")
    with gunicorn(database_url, tmp_path, *stock) as server:
        with Load(server.port).running() as load:
            for _ in range(2):  # Two are enough: each loses some requests.
                server.roll()
        total = load.answered + len(load.lost)
        figures.append(
            f"2 rolling restarts, stock worker: {len(load.lost)} of {total} requests lost"
        )
        assert load.answered > 1000
        assert load.lost != []


def test_sigterm_completes_requests_in_flight_with_connection_close(
    server: Gunicorn, database: Engine
) -> None:
    responses: list[tuple[int, str | None]] = []

    def read() -> None:
        with Connection(server.port) as connection:
            # A list with a filter is not batched: each waits for the lock in its own session.
            response = connection.send("GET", "/heroes/?name=a")
            responses.append((response.status, response.headers["Connection"]))

    threads = [threading.Thread(target=read) for _ in range(8)]
    with database.connect() as holder:
        holder.execute(text("BEGIN"))
        holder.execute(text("LOCK TABLE hero"))
        for thread in threads:
            thread.start()
        waiting = text(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with database.connect() as outside:
            server.wait_for(lambda: outside.execute(waiting).scalar_one() == len(threads))
        os.kill(server.pid, signal.SIGTERM)
        server.wait_for(lambda: sum("Draining" in line for line in server.lines) == 2)
        holder.execute(text("ROLLBACK"))
    for thread in threads:
        thread.join(20)
    # Without the header a client sends its next request on a connection that is about to close.
    assert responses == [(200, "close")] * len(threads)


def test_connections_that_wait_while_the_worker_stops_are_served(database_url: URL) -> None:
    """The kernel has completed their handshakes. The end of the listener would reset them."""
    is_blocked = threading.Event()

    class Blocking(BoundedProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            time.sleep(0.03)  # uvloop accepts one connection in each turn of the event loop.

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if b"/docs" in data:
                is_blocked.set()
                time.sleep(0.5)

    app = create_app(settings(database_url))
    server = DrainingServer(
        uvicorn.Config(app, port=0, http=Blocking, loop="uvloop", log_config=None)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = ("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])
    request = b"GET %b HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    with contextlib.ExitStack() as connections:
        first = connections.enter_context(socket.create_connection(address, timeout=10))
        first.sendall(request % b"/docs")
        assert is_blocked.wait(5)
        server.should_exit = True
        waiting = [
            connections.enter_context(socket.create_connection(address, timeout=10))
            for _ in range(10)
        ]
        for connection in waiting:
            connection.sendall(request % b"/health/live")
        for connection in waiting:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
    thread.join(10)


def test_a_stopping_worker_accepts_connections_until_it_closes_its_listener(
    database_url: URL, tmp_path: Path
) -> None:
    """Connections arrive until the listener is closed."""
    reset: list[str] = []
    for _ in range(3):
        with gunicorn(database_url, tmp_path, WEB_CONCURRENCY="1") as server:
            load = Load(server.port, keep_alive_clients=0, fresh_clients=16, pause_seconds=0.002)
            with load.running():
                while load.answered < 200:
                    time.sleep(0.01)
                server.stop()
        assert any("ConnectionRefusedError" in error for error in load.lost)
        reset += [error for error in load.lost if "ConnectionRefusedError" not in error]
    # The kernel resets a connection whose handshake is incomplete when the listener is closed. This
    # is rare. A worker that does not accept the waiting connections resets at least five.
    assert len(reset) < 3, reset


def test_a_draining_worker_is_not_ready_and_sends_connection_close(
    database_url: URL, tmp_path: Path
) -> None:
    with gunicorn(database_url, tmp_path, WEB_CONCURRENCY="1") as server:
        connection = Connection(server.port)
        assert connection.send("GET", "/health/ready").status == 200
        os.kill(server.pid, signal.SIGTERM)
        server.wait_for(lambda: any("Draining" in line for line in server.lines))
        response = connection.send("GET", "/health/ready")
        assert response.status == 503
        assert response.json == {"detail": "This worker is stopping"}
        assert response.headers["Connection"] == "close"
        with pytest.raises(ConnectionRefusedError):
            Connection(server.port)
        connection.close()


def get(plain: socket.socket) -> None:
    """Send a request and read its whole response."""
    plain.sendall(HEAD + b"\r\n")
    response = b""
    while not response.endswith(b"}"):
        response += plain.recv(65536)
    assert response.startswith(b"HTTP/1.1 200 ")


def test_an_idle_connection_is_closed_after_keep_alive_seconds(standing_server: Gunicorn) -> None:
    with socket.create_connection(("127.0.0.1", standing_server.port), timeout=20) as plain:
        get(plain)
        start = time.monotonic()
        assert plain.recv(65536) == b""
    assert 2.5 < time.monotonic() - start < 5


def test_draining_closes_idle_connections_long_before_their_keep_alive(server: Gunicorn) -> None:
    """Each worker has several. Another connection is used in time, and gets its response."""
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(8)]
    for plain in idle:
        get(plain)
    with Connection(server.port) as used:
        assert used.send("GET", "/heroes/").status == 200
        os.kill(server.pid, signal.SIGTERM)
        start = time.monotonic()
        time.sleep(3)
        response = used.send("GET", "/heroes/")
        assert (response.status, response.headers["Connection"]) == (200, "close")
        for plain in idle:
            assert plain.recv(65536) == b""
            plain.close()
    assert 4.5 < time.monotonic() - start < 7
    server.wait_for(lambda: not alive(server._process.pid), 3)


def test_a_killed_worker_is_replaced_and_its_gauges_are_removed(server: Gunicorn) -> None:
    master = server.pid

    def active() -> float:
        return metrics(server)["http_server_active_requests",]

    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.sendall(b"POST /heroes/ HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n")
        server.wait_for(lambda: active() == 1, 3)  # The control.
        for worker in server.children:
            os.kill(worker, signal.SIGKILL)
            server.wait_for_workers(1)
    assert server.pid == master
    assert server.get("/heroes/").status == 200
    server.wait_for(lambda: active() == 0, 3)


def test_workers_share_the_memory_of_the_libraries(
    standing_server: Gunicorn, figures: list[str]
) -> None:
    """Shared memory counts in `Pss` by the share of each process."""
    sizes = [
        {
            name: int(size)
            for name, size in re.findall(
                r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE
            )
        }
        for pid in standing_server.children
    ]
    assert len(sizes) == 2
    figures.append(
        "memory of a worker in MB, and its share of the shared memory: "
        + ", ".join(f"{size['Rss'] / 1024:.0f}, {size['Pss'] / 1024:.0f}" for size in sizes)
    )
    assert all(size["Pss"] < 0.65 * size["Rss"] for size in sizes)


def test_the_old_code_serves_on_if_the_new_code_is_broken(
    database_url: URL, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for part in ("app", "alembic", "alembic.ini", "gunicorn.conf.py"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, project / part)
    main = project / "app" / "main.py"
    sound = main.read_text()
    with gunicorn(database_url, tmp_path, root=project) as server:
        master = server.pid
        with Load(server.port).running() as load:
            main.write_text(sound + "\nraise RuntimeError('broken release')\n")
            os.kill(master, signal.SIGUSR2)
            server.wait_for(lambda: "Worker failed to boot" in server._log.read_text())
            server.wait_for(
                lambda: len(server.children) == 2
            )  # The old master has reaped the new one.
            assert server.pid == master
            main.write_text(sound)
            server.roll()
        assert load.lost == []


def test_slow_connections_are_closed_and_other_requests_succeed(standing_server: Gunicorn) -> None:
    """Some clients send nothing; some send a byte every half second, in head or body."""
    head = b"POST /heroes/ HTTP/1.1\r\nHost: heroes\r\nContent-Length: 60000\r\n"
    begun = [b"", head, head + b"\r\n"]
    start = time.monotonic()
    slow = {}
    for number in range(200):
        plain = socket.create_connection(("127.0.0.1", standing_server.port))
        plain.sendall(begun[number % len(begun)])
        plain.setblocking(False)
        slow[plain] = bool(begun[number % len(begun)])
    early = 0
    with Load(standing_server.port, keep_alive_clients=4, fresh_clients=2).running() as load:
        while slow and time.monotonic() - start < 12:
            time.sleep(0.5)
            for plain, drips in list(slow.items()):
                if was_closed(plain, b"x" if drips else b""):
                    early += time.monotonic() - start < 9
                    plain.close()
                    del slow[plain]
    for plain in slow:
        plain.close()
    assert len(slow) == 0, "not closed in 12 s"
    assert early == 0, "closed before their 10 s were over"
    assert load.lost == []
    assert load.answered > 200


def was_closed(plain: socket.socket, more: bytes) -> bool:
    """Send `more`; return whether the server has closed the connection."""
    try:
        plain.send(more)
        return plain.recv(1024) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_client_that_reads_no_responses_is_disconnected(
    server: Gunicorn, database: Engine
) -> None:
    rows = "SELECT repeat('x', 200), 's' FROM generate_series(1, 100)"
    with database.connect() as connection:
        connection.execute(text(f"INSERT INTO hero (name, secret_name) {rows}"))
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as plain:
        closed = False
        while not closed and time.monotonic() - start < 30:
            try:
                plain.sendall(b"GET /heroes/ HTTP/1.1\r\nHost: heroes\r\n\r\n")
            except TimeoutError:
                pass  # The server stops reading while its responses are not read.
            except OSError:
                closed = True
            time.sleep(0.005)
    assert closed


def test_a_client_that_leaves_a_small_rest_unread_is_disconnected(
    database_url: URL, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is too small to pause the server's writing and too large for the kernel."""
    monkeypatch.setattr("app.server.protocol.CLIENT_TIMEOUT_SECONDS", 1)
    rows = "SELECT repeat('x', 200), 's' FROM generate_series(1, 100)"
    with database.connect() as connection:
        connection.execute(text(f"INSERT INTO hero (name, secret_name) {rows}"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        config = {"http": BoundedProtocol, "timeout_keep_alive": 1, "fd": listener.fileno()}
        with serve(settings(database_url), **config) as service, socket.socket() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.connect(listener.getsockname())
            plain.sendall(b"GET /heroes/ HTTP/1.1\r\nHost: heroes\r\n\r\n")
            start = time.monotonic()
            while not service.connections:
                assert time.monotonic() < start + 5
            while service.connections:
                assert time.monotonic() < start + 8
                time.sleep(0.05)


def test_empty_lines_after_a_response_do_not_keep_a_connection_open(
    standing_server: Gunicorn,
) -> None:
    start = time.monotonic()
    assert send_raw(standing_server.port, HEAD + b"\r\n" + b"\r\n").startswith(b"HTTP/1.1 200 ")
    assert time.monotonic() - start < 6  # The keep-alive timeout is 3 s.


def test_trailers_after_a_body_are_bounded(standing_server: Gunicorn) -> None:
    chunked = (
        b"POST /heroes/ HTTP/1.1\r\nHost: heroes\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    )
    with socket.create_connection(("127.0.0.1", standing_server.port), timeout=10) as plain:
        plain.sendall(chunked + b"A: ")
        taken = 0
        with contextlib.suppress(OSError):
            while taken < 5_000_000:
                taken += plain.send(b"b" * 50_000)
                time.sleep(0.005)
    assert taken < 5_000_000
    # A few trailers are accepted and ignored.
    response = send_raw(standing_server.port, chunked + b"Connection: close\r\nA: b\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 422 ")


def test_a_bad_request_does_not_replace_the_response_to_the_request_before_it(
    server: Gunicorn, database: Engine
) -> None:
    post = b"POST /heroes/ HTTP/1.1\r\nHost: heroes\r\nContent-Type: application/json\r\n"
    good = post + b"Content-Length: %d\r\n\r\n" % len(HERO) + HERO
    response = send_raw(server.port, good + HEAD + b"A: b\r\n" * 101 + b"\r\n")
    assert response.startswith(b"HTTP/1.1 200 ")
    assert b"431" not in response.split(b"\r\n\r\n", 1)[1]
    with database.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM hero")).scalar_one() == 1


def test_metrics_in_a_configured_folder_survive_a_rolling_restart(
    database_url: URL, tmp_path: Path
) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    with gunicorn(database_url, tmp_path, PROMETHEUS_MULTIPROC_DIR=str(folder)) as server:
        server.roll()
        os.kill(server.children[0], signal.SIGKILL)
        server.wait_for_workers(1)
        assert server.get("/heroes/").status == 200
        assert ("http_server_active_requests",) in metrics(server)
    assert list(folder.iterdir()) == []


HEAD = b"GET /health/live HTTP/1.1\r\nHost: heroes\r\n"


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"A: b\r\n" * 100,
        HEAD + b"A: " + b"b" * 33_000 + b"\r\n",
        b"GET /" + b"x" * 33_000 + b" HTTP/1.1\r\nHost: heroes\r\n",
    ],
    ids=["101 fields", "a field of 33 KB", "a target of 33 KB"],
)
def test_a_head_that_is_too_large_is_refused_with_431(
    standing_server: Gunicorn, head: bytes
) -> None:
    # The server refuses a head in one piece and a head in two pieces in different code.
    assert send_raw(standing_server.port, head + b"\r\n").startswith(b"HTTP/1.1 431 ")
    with socket.create_connection(("127.0.0.1", standing_server.port), timeout=20) as plain:
        plain.sendall(head[:-10])
        time.sleep(0.2)
        plain.sendall(head[-10:] + b"\r\n")
        response = plain.recv(65536)
    assert response.startswith(b"HTTP/1.1 431 ")
    assert json.loads(response.split(b"\r\n\r\n")[1]) == {
        "detail": "The request's head is too large"
    }


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01 hello\r\n\r\n", HEAD + b"A: b\r\n" * 101 + b"\r\n"]
)
def test_the_log_has_the_client_and_the_id_of_a_refused_request(
    standing_server: Gunicorn, sent: bytes
) -> None:
    head = send_raw(standing_server.port, sent).partition(b"\r\n\r\n")[0]
    fields = dict(line.split(": ") for line in head.decode().split("\r\n")[1:])
    [logged] = [
        line for line in standing_server.log if line.get("request_id") == fields["x-request-id"]
    ]
    assert logged["client"] == "127.0.0.1"
    assert logged["message"].startswith("Refused a request: ")


def test_a_head_within_the_limits_is_served(standing_server: Gunicorn) -> None:
    close = b"Connection: close\r\n\r\n"
    for fields in (b"A: b\r\n" * 98, b"A: " + b"b" * 31_000 + b"\r\n"):
        assert send_raw(standing_server.port, HEAD + fields + close).startswith(b"HTTP/1.1 200 ")


def test_bytes_that_are_not_http_are_refused_with_400(standing_server: Gunicorn) -> None:
    response = send_raw(standing_server.port, b"\x16\x03\x01 hello\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 400 ")
    assert json.loads(response.split(b"\r\n\r\n")[1]) == {
        "detail": "Invalid HTTP request received."
    }


def test_heads_of_20_mb_do_not_increase_memory(standing_server: Gunicorn) -> None:
    def resident() -> int:
        pages = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            for pid in standing_server.children
        ]
        return sum(pages) * 4096

    send_raw(standing_server.port, HEAD + b"Connection: close\r\n\r\n")
    before = resident()
    for _ in range(5):
        send_raw(standing_server.port, HEAD + b"A: " + b"b" * 20_000_000 + b"\r\n\r\n")
    assert resident() - before < 4_000_000
    assert standing_server.get("/heroes/").status == 200


def test_metrics_cover_all_workers_and_clients_cannot_add_series(server: Gunicorn) -> None:
    for number in range(40):  # Each on a new connection, so that both workers get some.
        connection = Connection(server.port)
        assert connection.send("GET", f"/heroes/{number + 1000}").status == 404
        connection.send("GET", f"/villains/{number}")
        connection.send("POST", "/heroes/", b"[", Content_Type=JSON)
        connection.close()
    for attempt in range(5):
        counts = metrics(server)
        assert (
            counts[
                "http_server_request_duration_seconds_count",
                "http_request_method=GET",
                "http_response_status_code=404",
                "http_route=/heroes/{hero_id}",
            ]
            == 40
        ), attempt
    routes = {label for key in counts for label in key[1:] if label.startswith("http_route=")}
    assert {route.removeprefix("http_route=") for route in routes} == {
        *("/heroes/{hero_id}", "/heroes/", "/metrics", "none")
    }
    assert ("http_server_active_requests",) in counts
    assert ("db_client_connection_count", "state=used") in counts
    assert ("db_client_connection_pending_requests",) in counts
    assert counts["heroes_schema_info", f"code={HEAD_REVISION}", f"database={HEAD_REVISION}"] == 1
    assert any(key[0] == "heroes_build_info" for key in counts)


def test_database_errors_are_counted_by_sqlstate_class(server: Gunicorn, database: Engine) -> None:
    with database.connect() as connection:
        connection.execute(text("ALTER TABLE hero RENAME TO villain"))
    assert server.get("/heroes/").status == 503
    assert metrics(server)["database_errors_total", "sqlstate_class=42"] == 1


def test_the_pool_gauges_show_used_connections_and_waiting_requests(
    database_url: URL, tmp_path: Path, database: Engine
) -> None:
    with (
        gunicorn(
            database_url,
            tmp_path,
            DATABASE_POOL_SIZE="2",
            DATABASE_TIMEOUT="20",
            WEB_CONCURRENCY="1",
        ) as server,
        database.connect() as holder,
    ):
        holder.execute(text("BEGIN"))
        holder.execute(text("LOCK TABLE hero"))
        threads = [threading.Thread(target=server.get, args=("/heroes/?name=a",)) for _ in range(5)]
        for thread in threads:
            thread.start()

        def gauges() -> list[float]:
            now = metrics(server)
            return [
                now["db_client_connection_count", "state=used"],
                now["db_client_connection_pending_requests",],
            ]

        server.wait_for(lambda: gauges() == [2, 3], 4)
        holder.execute(text("ROLLBACK"))
        for thread in threads:
            thread.join(10)
        server.wait_for(lambda: gauges() == [0, 0], 4)


def test_every_log_line_is_json_with_the_same_fields(server: Gunicorn) -> None:
    server.get("/heroes/")
    send_raw(server.port, b"\x16\x03\x01 hello\r\n\r\n")
    server.roll()
    server.stop()
    loggers = set()
    for line in server.log:
        assert line.keys() >= {"timestamp", "level", "logger", "message"}
        loggers.add(line["logger"])
    assert loggers >= {"gunicorn.error", "uvicorn.error", "app.server.worker", "heroes.access"}


def test_systemd_is_notified_of_the_current_master(database_url: URL, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)

        def notified() -> set[str]:
            return {systemd.recv(1024).decode().splitlines()[0] for _ in range(2)}

        with gunicorn(database_url, tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify")) as server:
            first = server.pid
            assert notified() == {"READY=1", f"MAINPID={first}"}
            server.roll()
            assert server.pid != first
            assert notified() == {"READY=1", f"MAINPID={server.pid}"}


def test_the_connection_budget_is_logged_with_a_warning_if_it_is_exceeded(
    database_url: URL, tmp_path: Path
) -> None:
    with gunicorn(database_url, tmp_path, DATABASE_POOL_SIZE="200") as server:
        server.wait_for(lambda: any("exceeds the" in line for line in server.lines))
        budget = [line for line in server.log if "budget" in line["message"]]
    assert [line["level"] for line in budget] == ["INFO", "WARNING"]
    assert budget[0]["message"] == "Connection budget: 2 workers x pool of 200 = 400"


def test_the_server_starts_and_is_live_while_the_database_is_down(
    tmp_path: Path, database_url: URL
) -> None:
    unreachable = database_url.set(host="127.0.0.1", port=1, query={})
    with gunicorn(unreachable, tmp_path) as server:
        connection = Connection(server.port)
        assert connection.send("GET", "/health/live").status == 200
        assert connection.send("GET", "/health/ready").status == 503
        connection.close()
        assert alive(server.pid)


def test_workers_end_when_their_master_is_killed_and_a_new_master_can_start(
    database_url: URL, tmp_path: Path
) -> None:
    with gunicorn(database_url, tmp_path) as server:
        workers = server.children
        os.kill(server.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(alive(worker) for worker in workers):
            assert time.monotonic() < deadline, "the workers serve without a master"
            time.sleep(0.05)
    folder = tmp_path / "next"
    folder.mkdir()
    with gunicorn(database_url, folder, port=server.port) as server:
        assert server.get("/heroes/").status == 200

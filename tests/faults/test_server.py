"""The production server: it stops, rolls and loses workers without losing a request."""

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import URL, Engine, text

from app.db.revisions import Revisions
from app.server.protocol import BoundedProtocol
from tests.faults.load import Load
from tests.servers import Postgres
from tests.service import ROOT, Connection, Gunicorn, alive, gunicorn, serve, settings

JSON = "application/json"
HERO = b'{"name": "Deadpond", "secret_name": "Dive Wilson"}'
ROLLS = 5
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
    """One for all tests that leave it as it was."""
    name = f"heroes_server_{uuid.uuid4().hex}"
    url = postgres.create(name, str(templates["postgresql"].database))
    with gunicorn(url, tmp_path_factory.mktemp("server")) as server:
        yield server
    postgres.drop(name)


def sent(port: int, data: bytes) -> bytes:
    """What is answered to these bytes until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        answer = b""
        try:
            plain.sendall(data)
            while chunk := plain.recv(65536):
                answer += chunk
        except OSError:
            pass
        return answer


def metrics(server: Gunicorn) -> dict[tuple[str, ...], float]:
    exposition = server.get("/metrics").body.decode()
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def test_rolls_under_load_lose_no_request(server: Gunicorn, figures: list[str]) -> None:
    with Load(server.port).running() as load:
        for _ in range(ROLLS):
            server.roll()
    total = load.answered + len(load.lost)
    figures.append(
        f"{ROLLS} rolls, draining: {len(load.lost)} of {total} requests lost,"
        f" the slowest took {load.slowest:.2f} s"
    )
    assert load.answered > 1000
    assert load.lost == []
    assert load.slowest < 5


def test_the_stock_worker_loses_requests_in_such_rolls(
    database_url: URL, tmp_path: Path, figures: list[str]
) -> None:
    """The control: the load above does notice a lost request."""
    stock = ("--worker-class", "uvicorn_worker.UvicornWorker")
    with gunicorn(database_url, tmp_path, *stock) as server:
        with Load(server.port).running() as load:
            for _ in range(2):  # Enough: it loses some in each.
                server.roll()
        total = load.answered + len(load.lost)
        figures.append(f"2 rolls, stock worker: {len(load.lost)} of {total} requests lost")
        assert load.answered > 1000
        assert load.lost != []


def test_term_finishes_the_requests_in_flight_and_says_close(
    server: Gunicorn, database: Engine
) -> None:
    answers: list[tuple[int, str | None]] = []

    def read() -> None:
        with Connection(server.port) as connection:
            # Not batched: each request waits for the lock in a session of its own.
            answer = connection.send("GET", "/heroes/")
            answers.append((answer.status, answer.headers["Connection"]))

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
        with database.connect() as beside:
            server.wait_for(lambda: beside.execute(waiting).scalar_one() == len(threads))
        os.kill(server.pid, signal.SIGTERM)
        server.wait_for(lambda: sum("Draining" in line for line in server.lines) == 2)
        holder.execute(text("ROLLBACK"))
    for thread in threads:
        thread.join(20)
    # Without the header a client would send its next request to a connection about to be closed.
    assert answers == [(200, "close")] * len(threads)


def test_a_draining_worker_is_not_ready_and_says_close(database_url: URL, tmp_path: Path) -> None:
    with gunicorn(database_url, tmp_path, WEB_CONCURRENCY="1") as server:
        connection = Connection(server.port)
        assert connection.send("GET", "/health/ready").status == 200
        os.kill(server.pid, signal.SIGTERM)
        server.wait_for(lambda: any("Draining" in line for line in server.lines))
        answer = connection.send("GET", "/health/ready")
        assert answer.status == 503
        assert answer.json == {"detail": "This worker is stopping"}
        assert answer.headers["Connection"] == "close"
        with pytest.raises(ConnectionRefusedError):
            Connection(server.port)
        connection.close()


def test_a_killed_worker_is_replaced_and_its_gauges_go(server: Gunicorn) -> None:
    master = server.pid
    for worker in server.children:
        os.kill(worker, signal.SIGKILL)
        server.wait_for_workers(1)
    assert server.pid == master
    assert server.get("/heroes/").status == 200
    assert metrics(server)["http_server_active_requests",] == 1


def test_broken_new_code_leaves_the_old_serving(database_url: URL, tmp_path: Path) -> None:
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
            server.wait_for(lambda: len(server.children) == 2)  # The new master has been reaped.
            assert server.pid == master
            main.write_text(sound)
            server.roll()
        assert load.lost == []


def test_slow_connections_are_closed_while_others_are_served(standing_server: Gunicorn) -> None:
    """Silent from the start, and a byte each half second in the head and in the body."""
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
    assert early == 0, "closed in less than the 10 s that they have"
    assert load.lost == []
    assert load.answered > 200


def was_closed(plain: socket.socket, more: bytes) -> bool:
    """Sends `more`; says whether the server has closed the connection."""
    try:
        plain.send(more)
        return plain.recv(1024) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_client_that_does_not_read_its_answers_is_closed(
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
                pass  # The server reads no more while its answers are not read.
            except OSError:
                closed = True
            time.sleep(0.005)
    assert closed


def test_a_client_that_leaves_a_small_rest_unread_is_closed_too(
    database_url: URL, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little for the server to pause its writing, and too much for the kernel to take."""
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


def test_empty_lines_after_an_answer_do_not_keep_a_connection(standing_server: Gunicorn) -> None:
    start = time.monotonic()
    assert sent(standing_server.port, HEAD + b"\r\n" + b"\r\n").startswith(b"HTTP/1.1 200 ")
    assert time.monotonic() - start < 8  # The keep-alive timeout is 5 s.


def test_trailers_behind_a_body_are_bounded(standing_server: Gunicorn) -> None:
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
    # A few are taken, and ignored.
    answer = sent(standing_server.port, chunked + b"Connection: close\r\nA: b\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 422 ")


def test_a_bad_request_behind_a_good_one_does_not_take_its_answer(
    server: Gunicorn, database: Engine
) -> None:
    post = b"POST /heroes/ HTTP/1.1\r\nHost: heroes\r\nContent-Type: application/json\r\n"
    good = post + b"Content-Length: %d\r\n\r\n" % len(HERO) + HERO
    answer = sent(server.port, good + HEAD + b"A: b\r\n" * 101 + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"431" not in answer.split(b"\r\n\r\n", 1)[1]
    with database.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM hero")).scalar_one() == 1


def test_metrics_in_a_folder_of_the_operators_outlive_a_roll(
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
    # Once in one piece and once in two, which are refused in different places.
    assert sent(standing_server.port, head + b"\r\n").startswith(b"HTTP/1.1 431 ")
    with socket.create_connection(("127.0.0.1", standing_server.port), timeout=20) as plain:
        plain.sendall(head[:-10])
        time.sleep(0.2)
        plain.sendall(head[-10:] + b"\r\n")
        answer = plain.recv(65536)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.split(b"\r\n\r\n")[1]) == {"detail": "The request's head is too large"}


def test_a_head_within_its_bounds_is_served(standing_server: Gunicorn) -> None:
    close = b"Connection: close\r\n\r\n"
    for fields in (b"A: b\r\n" * 98, b"A: " + b"b" * 31_000 + b"\r\n"):
        assert sent(standing_server.port, HEAD + fields + close).startswith(b"HTTP/1.1 200 ")


def test_what_is_not_http_is_refused_with_400(standing_server: Gunicorn) -> None:
    answer = sent(standing_server.port, b"\x16\x03\x01 hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.split(b"\r\n\r\n")[1]) == {"detail": "Invalid HTTP request received."}


def test_a_head_of_20_mb_is_refused_with_memory_flat(standing_server: Gunicorn) -> None:
    def resident() -> int:
        pages = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            for pid in standing_server.children
        ]
        return sum(pages) * 4096

    sent(standing_server.port, HEAD + b"Connection: close\r\n\r\n")
    before = resident()
    for _ in range(5):
        sent(standing_server.port, HEAD + b"A: " + b"b" * 20_000_000 + b"\r\n\r\n")
    assert resident() - before < 4_000_000
    assert standing_server.get("/heroes/").status == 200


def test_metrics_are_of_all_workers_and_clients_cannot_make_them_grow(server: Gunicorn) -> None:
    for number in range(40):  # Each on a connection of its own, so that both workers get some.
        connection = Connection(server.port)
        assert connection.send("GET", f"/heroes/{number + 1000}").status == 404
        connection.send("GET", f"/villains/{number}")
        connection.send("POST", "/heroes/", b"[", Content_Type=JSON)
        connection.close()
    for worker_of_many in range(5):
        counts = metrics(server)
        assert (
            counts[
                "http_server_request_duration_seconds_count",
                "http_request_method=GET",
                "http_response_status_code=404",
                "http_route=/heroes/{hero_id}",
            ]
            == 40
        ), worker_of_many
    routes = {label for key in counts for label in key[1:] if label.startswith("http_route=")}
    assert {route.removeprefix("http_route=") for route in routes} == {
        *("/heroes/{hero_id}", "/heroes/", "/metrics", "none")
    }
    assert counts["http_server_active_requests",] == 1
    assert ("db_client_connection_count", "state=used") in counts
    assert ("db_client_connection_pending_requests",) in counts
    assert counts["heroes_schema_info", f"code={HEAD_REVISION}", f"database={HEAD_REVISION}"] == 1
    assert any(key[0] == "heroes_build_info" for key in counts)


def test_database_errors_are_counted_by_sqlstate_class(server: Gunicorn, database: Engine) -> None:
    with database.connect() as connection:
        connection.execute(text("ALTER TABLE hero RENAME TO villain"))
    assert server.get("/heroes/").status == 503
    assert metrics(server)["database_errors_total", "sqlstate_class=42"] == 1


def test_the_pool_gauges_show_connections_in_use_and_waiting(
    database_url: URL, tmp_path: Path, database: Engine
) -> None:
    with (
        gunicorn(database_url, tmp_path, DATABASE_POOL_SIZE="2", WEB_CONCURRENCY="1") as server,
        database.connect() as holder,
    ):
        holder.execute(text("BEGIN"))
        holder.execute(text("LOCK TABLE hero"))
        threads = [threading.Thread(target=server.get, args=("/heroes/",)) for _ in range(5)]
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


def test_every_line_of_the_log_is_json_in_one_format(server: Gunicorn) -> None:
    server.get("/heroes/")
    sent(server.port, b"\x16\x03\x01 hello\r\n\r\n")
    server.roll()
    server.stop()
    loggers = set()
    for line in server.log:
        assert line.keys() >= {"timestamp", "level", "logger", "message"}
        loggers.add(line["logger"])
    assert loggers >= {"gunicorn.error", "uvicorn.error", "app.server.worker", "heroes.access"}


def test_systemd_is_told_which_master_is_the_service(database_url: URL, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)

        def told() -> set[str]:
            return {systemd.recv(1024).decode().splitlines()[0] for _ in range(2)}

        with gunicorn(database_url, tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify")) as server:
            first = server.pid
            assert told() == {"READY=1", f"MAINPID={first}"}
            server.roll()
            assert server.pid != first
            assert told() == {"READY=1", f"MAINPID={server.pid}"}


def test_the_connection_budget_is_logged_and_an_excess_is_warned_of(
    database_url: URL, tmp_path: Path
) -> None:
    with gunicorn(database_url, tmp_path, DATABASE_POOL_SIZE="200") as server:
        server.wait_for(lambda: any("exceeds the" in line for line in server.lines))
        budget = [line for line in server.log if "budget" in line["message"]]
    assert [line["level"] for line in budget] == ["INFO", "WARNING"]
    assert budget[0]["message"] == "Connection budget: 2 workers x pool of 200 = 400"


def test_a_master_without_its_database_starts_and_is_live(
    tmp_path: Path, database_url: URL
) -> None:
    away = database_url.set(host="127.0.0.1", port=1, query={})
    with gunicorn(away, tmp_path) as server:
        connection = Connection(server.port)
        assert connection.send("GET", "/health/live").status == 200
        assert connection.send("GET", "/health/ready").status == 503
        connection.close()
        assert alive(server.pid)

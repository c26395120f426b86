"""The production server behind a proxy, and requests that only a raw socket can send."""

import contextlib
import json
import socket
import time
import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import URL

from tests.postgres import Postgres
from tests.processes import Gunicorn, gunicorn
from tests.service import Connection

PREFIX = "/api"


@pytest.fixture(scope="module")
def url(postgres: Postgres, templates: dict[str, URL]) -> Iterator[URL]:
    name = f"heroes_proxies_{uuid.uuid4().hex}"
    yield postgres.create(name, str(templates["postgresql"].database))
    postgres.drop(name)


@pytest.fixture(scope="module")
def server(url: URL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """A server that trusts the proxies on this machine."""
    folder = tmp_path_factory.mktemp("server")
    with gunicorn(url, folder, WEB_CONCURRENCY="1") as server:
        yield server


@pytest.fixture(scope="module")
def prefixed(url: URL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """A server behind a path prefix. It trusts one proxy, on another machine."""
    folder = tmp_path_factory.mktemp("prefixed")
    with gunicorn(
        url, folder, WEB_CONCURRENCY="1", ROOT_PATH=PREFIX, FORWARDED_ALLOW_IPS="192.0.2.1"
    ) as server:
        yield server


def logged_client(server: Gunicorn, forwarded: str) -> str:
    """Send a request with this X-Forwarded-For; return the client's address in its log line."""
    request_id = uuid.uuid4().hex
    with Connection(server.port) as connection:
        answer = connection.send(
            "GET", "/openapi.json", X_Request_ID=request_id, X_Forwarded_For=forwarded
        )
    assert answer.status == 200
    server.wait_for(lambda: any(request_id in line for line in server.lines))
    return str(next(line["client"] for line in server.log if line.get("request_id") == request_id))


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:4711", "192.0.2.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("[2001:db8::7]:4711", "2001:db8::7"),
        # The client sent the first address. The proxy appended the second one.
        ("203.0.113.9, 192.0.2.7", "192.0.2.7"),
        ("192.0.2.7, 127.0.0.1", "192.0.2.7"),
        ("", "127.0.0.1"),
    ],
)
def test_the_log_has_the_client_that_a_trusted_proxy_names(
    server: Gunicorn, forwarded: str, client: str
) -> None:
    assert logged_client(server, forwarded) == client


def test_an_address_from_an_untrusted_client_is_ignored(prefixed: Gunicorn) -> None:
    assert logged_client(prefixed, "192.0.2.7") == "127.0.0.1"
    assert logged_client(prefixed, "192.0.2.1") == "127.0.0.1"


def test_links_contain_the_prefix_that_a_proxy_has_stripped(prefixed: Gunicorn) -> None:
    hero = b'{"name": "Deadpond", "secret_name": "Dive Wilson"}'
    with Connection(prefixed.port) as connection:
        created = [
            connection.send("POST", "/heroes/", hero, Content_Type="application/json")
            for _ in range(2)
        ]
        for answer in created:
            assert answer.headers["Location"] == f"{PREFIX}/heroes/{answer.json['id']}"
        page = connection.send("GET", "/heroes/?limit=1")
        assert page.headers["Link"].startswith(f"<{PREFIX}/heroes/?limit=1&after=")
        assert connection.send("GET", "/").headers["Location"] == f"{PREFIX}/docs"
        assert f"url: '{PREFIX}/openapi.json'" in connection.send("GET", "/docs").body.decode()
        assert connection.send("GET", "/openapi.json").json["servers"] == [{"url": PREFIX}]


def exchange(server: Gunicorn, request: bytes, body: bytes = b"") -> tuple[int, bytes, bytes]:
    """Send the request; return the status, the head and the body of its last response.

    The body of the request follows after a 100.
    """
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as plain:
        plain.sendall(request)
        response = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := plain.recv(65536):
                response += chunk
                if response == CONTINUE:
                    response = b""
                    plain.sendall(body)
    head, _, content = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), response
    return int(head.split()[1]), head.lower(), content


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HOST = b"Host: heroes\r\n"
CLOSE = HOST + b"Connection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://heroes.example/health/live", 200),
        ("HTTPS://heroes.example:8443/health/live?x", 200),
        ("http://[2001:db8::1]/health/live", 200),
        ("http://[2001:db8::1/health/live", 400),
        ("http://heroes.example:99999/health/live", 400),
        ("http:///health/live", 400),
        ("//health/live", 404),
        ("/health//live", 404),
        ("/health/live/", 404),
        ("/./health/live", 404),
        ("/x/../health/live", 404),
        ("/health/%6cive", 200),
        ("/health%2Flive", 200),
        ("/%2Fhealth/live", 404),
        ("/health/live%2F", 404),
        ("/health/live%00", 404),
        ("/health/live%", 404),
        ("/health/live%ff", 404),
        ("/heroes/%30", 404),
        ("/heroes//1", 404),
        ("/heroes/%", 422),
        ("/heroes/%ff%fe", 422),
        ("/heroes/1%2F2", 404),
        ("/heroes/?name=%ff%fe", 200),
        ("*", 404),
        ("?", 400),
        ("health/live", 400),
        ("/health/\xe9", 400),
    ],
)
def test_unusual_targets_are_served_or_refused(server: Gunicorn, target: str, status: int) -> None:
    request = f"GET {target} HTTP/1.1\r\n".encode("latin-1") + CLOSE
    assert exchange(server, request)[0] == status


@pytest.mark.parametrize(
    "header",
    [
        'Forwarded: for=;;;by="',
        'Forwarded: for="[::1";proto=gopher;host=x:99999',
        "X-Forwarded-For: ,,,",
        "X-Forwarded-For: [::1",
        "X-Forwarded-For: [::1]:x",
        "X-Forwarded-For: 192.0.2.7:99999999999999999999",
        "X-Forwarded-For: 192.0.2.7:-1",
        f"X-Forwarded-For: 192.0.2.7:{'9' * 5000}",
        "X-Forwarded-For: \xff\xfe",
        f"X-Forwarded-For: {'a,' * 9000}",
        "X-Forwarded-Proto: gopher",
        "X-Forwarded-Proto: \xff",
        "X-Forwarded-Port: -1",
        "X-Forwarded-Host: a b/c",
        "X-Forwarded-Prefix: //evil.example",
    ],
    ids=lambda header: header[:40].encode("unicode_escape").decode(),
)
def test_a_malformed_forwarded_header_does_no_harm(server: Gunicorn, header: str) -> None:
    """Also if a trusted proxy sends it. Links do not contain its values."""
    request = b"GET / HTTP/1.1\r\n" + header.encode("latin-1") + b"\r\n" + CLOSE
    status, head, _ = exchange(server, request)
    assert status == 307
    assert b"location: /docs\r\n" in head


@pytest.mark.parametrize("hosts", [b"", HOST + HOST, b"Host: a\r\nHost: b\r\n"])
def test_a_request_without_one_host_is_refused(server: Gunicorn, hosts: bytes) -> None:
    request = b"GET /health/live HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n"
    assert exchange(server, request)[0] == 400


@pytest.mark.parametrize("head", [b"", HOST, b"Connection: keep-alive\r\n"])
def test_an_http_1_0_client_gets_a_length_and_the_end_of_the_connection(
    server: Gunicorn, head: bytes
) -> None:
    for path in (b"/health/live", b"/heroes/export"):
        request = b" HTTP/1.0\r\n" + head + b"\r\n"
        status, get, body = exchange(server, b"GET " + path + request)
        assert status == 200
        assert b"content-length: %d\r\n" % len(body) in get
        assert b"transfer-encoding" not in get
        assert b"connection: close" in get
        status, _, body = exchange(server, b"HEAD " + path + request)
        assert (status, body) == (200, b"")


LINE = b'{"name": "Deadpond", "secret_name": "Dive Wilson"}\n'


def import_head(length: int, media_type: bytes = b"application/x-ndjson") -> bytes:
    return (
        b"POST /heroes/import HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\n"
        b"Content-Type: " + media_type + b"\r\nContent-Length: %d\r\n\r\n" % length
    )


def test_a_large_import_is_sent_after_a_100(server: Gunicorn) -> None:
    rows = LINE * 40_000  # 2 MB
    status, _, body = exchange(server, import_head(len(rows)), rows)
    assert (status, json.loads(body)) == (200, {"created": 40_000})


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (import_head(1024**3 + 1), 413),
        (import_head(100, b"application/json"), 415),
        (import_head(100).replace(b"/import", b"/1"), 405),
        (import_head(100).replace(b"/heroes/import", b"/nowhere"), 404),
        (import_head(65_537).replace(b"/import", b"/"), 413),
    ],
    ids=["too large", "wrong type", "wrong method", "wrong path", "too large for one"],
)
def test_a_refused_request_does_not_get_a_100_and_ends_the_connection(
    server: Gunicorn, request_head: bytes, status: int
) -> None:
    """Without the end, the server would take the client's next request for the body."""
    got, head, _ = exchange(server, request_head)
    assert got == status
    assert b"connection: close" in head


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
POST = (
    b"POST /heroes/ HTTP/1.1\r\n" + HOST + UPGRADE + b"Content-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(LINE) + LINE
)


@pytest.mark.parametrize("first", [len(POST), 20, len(POST) - len(LINE) - 2, len(POST) - 5])
def test_a_request_that_asks_for_http_2_keeps_its_body(server: Gunicorn, first: int) -> None:
    """Another request follows on the same connection. The pieces end at any place."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.sendall(POST[:first])
        time.sleep(0.1)
        plain.sendall(POST[first:] + b"GET /health/live HTTP/1.1\r\n" + CLOSE)
        response = b""
        while chunk := plain.recv(65536):
            response += chunk
    assert response.count(b"HTTP/1.1 200 ") == 2
    assert b'"name":"Deadpond"' in response
    assert response.endswith(b'{"status":"live"}')


def test_only_the_first_of_many_upgrades_in_one_piece_is_served(server: Gunicorn) -> None:
    get = b"GET /health/live HTTP/1.1\r\n" + HOST + UPGRADE + b"\r\n"
    status, _, body = exchange(server, get * 300)
    assert (status, body) == (200, b'{"status":"live"}')
    assert not [line for line in server.lines if "Traceback" in line]


def test_an_upgrade_to_websocket_is_ignored(server: Gunicorn) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as plain:
        plain.sendall(b"GET /health/live HTTP/1.1\r\n" + HOST + upgrade)
        assert plain.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert not [line for line in server.log if "WebSocket" in line["message"]]

"""The production server behind a proxy, and requests that only a raw socket can send."""

import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import URL

from tests.servers import Postgres
from tests.service import Connection, Gunicorn, gunicorn

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
            "GET", "/health/live", X_Request_ID=request_id, X_Forwarded_For=forwarded
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

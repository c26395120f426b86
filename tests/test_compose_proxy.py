"""`deploy/compose.proxy.yml`: two containers of the service, and Caddy with TLS."""

import gzip
import json
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator

import httpx2
import pytest

from tests.compose import Stack, commands_in, needs_compose
from tests.faults.load import Load
from tests.service import free_port

pytestmark = needs_compose
IMAGE = "caddy:2"
CREATE = '{"name": "Deadpond", "secret_name": "Dive Wilson"}'
LONG = {"name": "\U0001f9b8" * 200, "secret_name": "Dive Wilson"}
REQUESTS = (
    ("GET", "/heroes/?limit=5", ""),
    ("POST", "/heroes/", CREATE),
    ("POST", "/heroes", CREATE),
)
REPLACE = (
    "docker compose up -d --no-deps --wait api",
    "docker compose up -d --no-deps --wait api-2",
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True).returncode:
        pytest.skip(f"needs the image {IMAGE}")
    stack = Stack(tmp_path_factory.mktemp("proxy"), "deploy/compose.proxy.yml")
    stack.port = free_port()
    stack.env |= {"HTTPS_PORT": str(stack.port), "HTTP_PORT": str(free_port())}
    stack.env |= {"WEB_CONCURRENCY": "1"}
    with stack.started():
        deadline = time.monotonic() + 20  # The proxy makes its CA after its start.
        copy = "docker compose cp proxy:/data/caddy/pki/authorities/local/root.crt ."
        while stack.run(copy, check=False).returncode:
            assert time.monotonic() < deadline, stack.run("docker compose logs proxy").stdout
            time.sleep(0.2)
        yield stack


@pytest.fixture(scope="module")
def tls(stack: Stack) -> ssl.SSLContext:
    """Trusts only Caddy's own CA."""
    return ssl.create_default_context(cafile=str(stack.folder / "root.crt"))


@pytest.fixture
def client(stack: Stack, tls: ssl.SSLContext) -> Iterator[httpx2.Client]:
    url = f"https://localhost:{stack.port}"
    with httpx2.Client(base_url=url, verify=tls, timeout=30) as client:
        yield client


def test_the_contract_holds_over_tls(client: httpx2.Client) -> None:
    created = client.post("/heroes/", json=json.loads(CREATE))
    assert created.status_code == 200
    assert client.get(created.headers["location"]).json() == created.json()
    assert client.get("/docs").status_code == 200
    assert client.head("/heroes/").status_code == 200
    assert client.get("/heroes/0").json() == {"detail": "Hero not found"}


def test_plain_http_is_redirected_to_https(stack: Stack) -> None:
    response = httpx2.get(
        f"http://127.0.0.1:{stack.env['HTTP_PORT']}/", headers={"Host": "localhost"}
    )
    assert (response.status_code, response.headers["location"]) == (308, "https://localhost/")


@pytest.mark.parametrize(
    "target",
    [
        *(
            "/metrics",
            "/metrics/",
            "/metrics?x",
            "//metrics",
            "/%6detrics",
            "/./metrics",
            "/METRICS",
        ),
        *(
            "/x/../metrics",
            "/heroes/../metrics",
            "/heroes/%2e%2e/metrics",
            "/metrics%2f",
            "/metrics;x",
        ),
        *("/health/live", "/health/ready", "//health//ready", "/health%2Fready", "/%2Fmetrics"),
        "http://localhost/metrics",
    ],
)
def test_operators_paths_are_not_reachable_from_outside(
    stack: Stack, tls: ssl.SSLContext, target: str
) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    plain = socket.create_connection(("127.0.0.1", stack.port), timeout=10)
    with tls.wrap_socket(plain, server_hostname="localhost") as encrypted:
        encrypted.sendall(request.encode())
        response = b""
        while chunk := encrypted.recv(65536):
            response += chunk
    assert response.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 ")), response
    assert b"python_info" not in response
    assert b'"status"' not in response


def test_the_log_has_the_clients_address_and_not_an_invented_one(
    stack: Stack, client: httpx2.Client
) -> None:
    response = client.get("/heroes/", headers={"X-Forwarded-For": "192.0.2.1"})
    lines = stack.run("docker compose logs --no-log-prefix api api-2").stdout.splitlines()
    line = next(each for each in lines if response.headers["X-Request-ID"] in each)
    gateway = stack.run(
        "docker network inspect --format '{{(index .IPAM.Config 0).Gateway}}'"
        " ${COMPOSE_PROJECT_NAME}_default"
    )
    assert json.loads(line)["client"] == gateway.stdout.strip()


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_conditional_requests_work_with_compressed_responses(
    client: httpx2.Client, coding: str
) -> None:
    accept = {"Accept-Encoding": coding}
    # Caddy compresses from 512 bytes on. JSON has this many.
    path = client.post("/heroes/", json=LONG).headers["location"]
    with client.stream("GET", path, headers=accept) as response:
        etag = response.headers["etag"]
    assert (response.headers["content-encoding"], etag) == (coding, f'"1-{coding}"')
    for known in (etag, '"1"', f'"1-{coding}", "7"', f'"7", W/"1-{coding}"', "*"):
        fresh = client.get(path, headers={**accept, "If-None-Match": known})
        assert fresh.status_code == 304, known
    assert client.get(path, headers={**accept, "If-None-Match": '"2-gzip"'}).status_code == 200
    for stale in ('"2"', f'"2-{coding}"'):
        refused = client.patch(path, json={"age": 1}, headers={"If-Match": stale})
        assert refused.status_code == 412, stale
    changed = client.patch(path, json={"age": 1}, headers={"If-Match": f'"7-gzip", {etag}'})
    assert changed.status_code == 200


@pytest.mark.parametrize("accept", ["application/x-ndjson", "text/csv"])
def test_lists_and_exports_are_compressed(client: httpx2.Client, accept: str) -> None:
    for _ in range(20):
        client.post("/heroes/", json=LONG)
    for path in ("/heroes/", "/heroes/export"):
        headers = {"Accept": accept, "Accept-Encoding": "gzip"}
        with client.stream("GET", path, headers=headers) as response:
            compressed = b"".join(response.iter_raw())
        assert response.headers["content-encoding"] == "gzip"
        plain = client.get(path, headers={"Accept": accept, "Accept-Encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert gzip.decompress(compressed) == plain.content
        assert len(compressed) < len(plain.content) / 2


def full_load(stack: Stack, tls: ssl.SSLContext, *, idempotency_keys: bool) -> Load:
    """Reads and creates without pauses."""
    return Load(
        stack.port,
        REQUESTS,
        pause_seconds=0,
        host="localhost",
        tls=tls,
        idempotency_keys=idempotency_keys,
    )


@pytest.mark.parametrize("idempotency_keys", [True, False])
def test_replacing_both_containers_loses_no_request(
    stack: Stack, tls: ssl.SSLContext, figures: list[str], *, idempotency_keys: bool
) -> None:
    commands = commands_in("### With a proxy and TLS")
    assert commands[2:] == list(REPLACE)
    containers = "docker compose ps -q api api-2"
    before = set(stack.run(containers).stdout.split())
    stack.env["DATABASE_TIMEOUT"] = "6" if idempotency_keys else "7"  # A new release.
    created = int(stack.sql("SELECT count(*) FROM hero"))
    load = full_load(stack, tls, idempotency_keys=idempotency_keys)
    with load.running():
        for command in commands:
            stack.run(command)
    figures.append(
        f"both containers replaced, through Caddy, idempotency keys {idempotency_keys}:"
        f" {len(load.lost)} of {load.answered + len(load.lost)} requests lost,"
        f" the slowest took {load.slowest:.2f} s"
    )
    assert not before & set(stack.run(containers).stdout.split())
    assert load.answered > 1000
    # Without a key, the kernel may reset one: see docs/operations.md.
    assert len(load.lost) <= (0 if idempotency_keys else 1), load.lost
    assert int(stack.sql("SELECT count(*) FROM hero")) > created


@pytest.mark.parametrize("idempotency_keys", [True, False])
def test_a_killed_container_loses_only_creates_without_a_key(
    stack: Stack, tls: ssl.SSLContext, figures: list[str], *, idempotency_keys: bool
) -> None:
    """Without keys, this is the control for the previous test."""
    load = full_load(stack, tls, idempotency_keys=idempotency_keys)
    with load.running():
        for _ in range(3):
            stack.run("docker compose kill api && docker compose up -d --no-deps --wait api")
    figures.append(
        f"a container killed 3 times, through Caddy, idempotency keys {idempotency_keys}:"
        f" {len(load.lost)} of {load.answered + len(load.lost)} requests lost"
    )
    assert load.answered > 1000
    if idempotency_keys:
        assert load.lost == []
    else:
        assert len(load.lost) > 1


def test_stopping_both_containers_loses_requests(stack: Stack, tls: ssl.SSLContext) -> None:
    """The control for the previous test."""
    with Load(stack.port, host="localhost", tls=tls).running() as load:
        stack.run("docker compose stop api api-2")
    assert load.lost != []
    with httpx2.Client(base_url=f"https://localhost:{stack.port}", verify=tls) as client:
        response = client.post("/heroes/", json=LONG, timeout=30)
    assert response.status_code in (502, 503)
    assert response.json() == {"detail": "The service is unavailable"}
    assert response.headers["retry-after"] == "1"

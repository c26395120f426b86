"""Rolling restarts through real proxies, which reuse their connections to the service."""

import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import URL, Engine, text

from tests.faults.load import Load
from tests.faults.network import network
from tests.postgres import docker_answers
from tests.processes import gunicorn
from tests.service import free_port


class Proxy(NamedTuple):
    """An image, the path of its configuration, and a configuration with two ports."""

    image: str
    path: str
    configuration: str


CADDY = Proxy(
    "caddy:2",
    "/etc/caddy/Caddyfile",
    """
{{
    admin off
}}
http://:{listen} {{
    bind 127.0.0.1
    reverse_proxy 127.0.0.1:{service}
}}
""",
)
HAPROXY = Proxy(
    "haproxy:3.2",
    "/usr/local/etc/haproxy/haproxy.cfg",
    """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    http-reuse always
listen heroes
    bind 127.0.0.1:{listen}
    server heroes 127.0.0.1:{service} pool-purge-delay 60s
""",
)
CREATE = '{"name": "Deadpond", "secret_name": "Dive Wilson"}'
ROUND_TRIP = 0.01  # Seconds.


@pytest.fixture
def backend() -> str:
    return "postgresql"


@pytest.fixture(params=[CADDY, HAPROXY], ids=lambda proxy: proxy.image.partition(":")[0])
def proxy(request: pytest.FixtureRequest) -> Proxy:
    proxy: Proxy = request.param
    if not (shutil.which("docker") and docker_answers()):
        pytest.skip("needs a Docker Engine")
    if subprocess.run(["docker", "image", "inspect", proxy.image], capture_output=True).returncode:
        pytest.skip(f"needs the image {proxy.image}")
    return proxy


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def running(proxy: Proxy, service: int, folder: Path) -> Iterator[int]:
    """Run the proxy in front of this port; yield its own port."""
    listen = free_port()
    file = folder / "proxy.conf"
    file.write_text(proxy.configuration.format(listen=listen, service=service))
    name = f"heroes-proxy-{uuid.uuid4().hex[:8]}"
    subprocess.run(
        [
            *("docker", "run", "--detach", "--rm", "--network", "host", "--name", name),
            *("--volume", f"{file}:{proxy.path}:ro", proxy.image),
        ],
        check=True,
        capture_output=True,
    )
    try:
        deadline = time.monotonic() + 20
        while not listens(listen):
            assert time.monotonic() < deadline, f"{proxy.image} did not start"
            time.sleep(0.1)
        yield listen
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True)


def restart_under_load(
    proxy: Proxy, database_url: URL, folder: Path, restarts: int, *arguments: str
) -> Load:
    """Restart the service, which the proxy reaches over a network with a latency.

    A request is lost if the service closes its connection while the request is on its way. Without
    a network, this time is too short for a test.
    """
    with (
        gunicorn(database_url, folder, *arguments) as server,
        network(URL.create("http", host="127.0.0.1", port=server.port), ROUND_TRIP) as remote,
        running(proxy, remote.port, folder) as port,
    ):
        load = Load(port, (("POST", "/heroes/", CREATE),))
        with load.running():
            for _ in range(restarts):
                server.roll()
        return load


def test_rolling_restarts_through_a_proxy_lose_no_request(
    proxy: Proxy, database_url: URL, database: Engine, tmp_path: Path, figures: list[str]
) -> None:
    load = restart_under_load(proxy, database_url, tmp_path, 2)
    figures.append(
        f"2 rolling restarts, draining, through {proxy.image}: {len(load.lost)} of"
        f" {load.answered + len(load.lost)} requests lost, the slowest took {load.slowest:.2f} s"
    )
    assert load.answered > 1000
    assert load.lost == []
    with database.connect() as connection:  # Not one request was sent twice.
        assert connection.execute(text("SELECT count(*) FROM hero")).scalar_one() == load.answered


def test_the_stock_worker_loses_requests_through_a_proxy(
    proxy: Proxy, database_url: URL, tmp_path: Path, figures: list[str]
) -> None:
    """The control for the previous test: the proxy does not hide lost requests."""
    stock = ("--worker-class", "uvicorn_worker.UvicornWorker")
    load = restart_under_load(proxy, database_url, tmp_path, 1, *stock)
    figures.append(
        f"1 rolling restart, stock worker, through {proxy.image}: {len(load.lost)} of"
        f" {load.answered + len(load.lost)} requests lost"
    )
    assert load.lost != []

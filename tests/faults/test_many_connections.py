"""The process stays responsive with many connections. `make faults` runs this."""

import json
import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path

import pytest
from sqlalchemy import URL

from tests.examples import DEADPOND
from tests.faults.load import Load
from tests.faults.network import client_ports
from tests.processes import gunicorn
from tests.service import Connection

CONNECTIONS = 2000
REQUESTS_PER_SECOND = 250
RAMP_SECONDS = 2 * CONNECTIONS / REQUESTS_PER_SECOND
pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("FAULTS") or resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4096,
        reason="measures time: run `make faults`, with 4,096 open files",
    ),
    pytest.mark.parametrize("backend", ["postgresql"], indirect=True),
]


def send_requests(port: int) -> None:
    """Send requests on all connections. Runs in a process of its own."""
    create = ("POST", "/heroes/", json.dumps(DEADPOND))
    load = Load(
        port,
        [("GET", "/heroes/1", ""), ("GET", "/heroes/?limit=1", ""), create],
        keep_alive_clients=CONNECTIONS,
        fresh_clients=0,
        pause_seconds=RAMP_SECONDS,
    )
    with load.running():
        time.sleep(600)


def test_liveness_is_reported_quickly_while_2000_clients_send_requests(
    database_url: URL, tmp_path: Path, figures: list[str]
) -> None:
    context = multiprocessing.get_context("spawn")
    with gunicorn(database_url, tmp_path, WEB_CONCURRENCY="1") as service:
        clients = context.Process(target=send_requests, args=(service.port,))
        clients.start()
        try:
            time.sleep(RAMP_SECONDS + 1)
            times = []
            with Connection(service.port) as connection:
                for _ in range(400):
                    start = time.monotonic()
                    assert connection.send("GET", "/health/live").status == 200
                    times.append(time.monotonic() - start)
                    time.sleep(0.02)
            established = len(client_ports(service.port))
        finally:
            clients.terminate()
            clients.join()
    p99 = statistics.quantiles(times, n=100)[-1]
    figures.append(
        f"/health/live with {established} connections at {REQUESTS_PER_SECOND} requests/s:"
        f" median {statistics.median(times) * 1000:.1f} ms, p99 {p99 * 1000:.0f} ms"
    )
    assert established > 0.99 * CONNECTIONS
    assert statistics.median(times) < 0.05

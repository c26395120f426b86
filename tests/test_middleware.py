"""Request ids, the access log, and the traceback of an unexpected error."""

import json
import logging
import os
import signal
import subprocess
import sys

import httpx2
import pytest
from sqlalchemy import URL

from app.heroes import heroes
from tests.service import ROOT, Connection, Service, environment

pytestmark = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
JSON = "application/json"


def test_every_response_has_its_own_request_id(client: httpx2.Client) -> None:
    responses = [client.get(path) for path in ("/heroes/", "/heroes/1", "/nowhere", "/docs")]
    ids = [response.headers["x-request-id"] for response in responses]
    assert all(ids)
    assert len(set(ids)) == len(ids)


def test_a_request_id_from_the_client_is_kept(client: httpx2.Client) -> None:
    response = client.get("/heroes/", headers={"X-Request-ID": "f00-BAR_1"})
    assert response.headers.get_list("x-request-id") == ["f00-BAR_1"]


@pytest.mark.parametrize("invalid", ["", "a b", "x" * 129, "caf\u00e9"])
def test_an_invalid_request_id_is_replaced(client: httpx2.Client, invalid: str) -> None:
    response = client.get("/heroes/", headers={b"X-Request-ID": invalid.encode("latin-1")})
    assert response.headers["x-request-id"] not in ("", invalid)


def test_a_bug_is_a_logged_500_with_a_request_id_and_the_connection_stays_open(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("the bug")

    monkeypatch.setattr(heroes, "get_many", bug)
    connection = service.connection()
    response = connection.send("GET", "/heroes/1")
    assert response.status == 500
    assert response.json == {"detail": "Internal Server Error"}
    assert response.headers["X-Request-ID"]
    assert connection.send("GET", "/heroes/").status == 200
    connection.close()
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError


def test_every_log_line_is_a_json_object_without_secrets(database_url: URL) -> None:
    """A real process starts, handles valid and invalid requests, and stops."""
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0"],
        cwd=ROOT,
        env=environment(database_url, LOG_FORMAT="json"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr
    lines = []
    port = None
    while port is None:
        lines.append(json.loads(server.stderr.readline()))
        if "running on" in lines[-1]["message"]:
            port = int(lines[-1]["message"].split(":")[2].split(" ")[0])

    connection = Connection(port)
    hero = b'{"name": "Deadpond", "secret_name": "Dive Wilson"}'
    created = connection.send("POST", "/heroes/", hero, Content_Type=JSON)
    connection.send("POST", "/heroes/", hero[:-1], Content_Type=JSON)
    connection.send("GET", "/heroes/%0A%22?name=Wilson")
    connection.send("GET", "/health/live")  # Successful probes are not logged.
    connection.send("GET", "/health/none")
    connection.close()
    os.kill(server.pid, signal.SIGTERM)
    _, rest = server.communicate(timeout=10)

    lines += [json.loads(line) for line in rest.splitlines()]
    assert all(line.keys() >= {"timestamp", "level", "logger", "message"} for line in lines)
    access = [line for line in lines if line["logger"] == "heroes.access"]
    assert [(line["method"], line["path"], line["status"]) for line in access] == [
        ("POST", "/heroes/", 200),
        ("POST", "/heroes/", 422),
        ("GET", "/heroes/%0A%22", 422),
        ("GET", "/health/none", 404),
    ]
    assert access[0]["request_id"] == created.headers["X-Request-ID"]
    assert access[0]["client"] == "127.0.0.1"
    assert access[0]["duration_ms"] > 0
    assert "Wilson" not in json.dumps(lines)

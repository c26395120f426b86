"""Errors in the format that the client accepts: FastAPI's or RFC 9457's."""

import httpx2
import pytest
from sqlalchemy import Engine, text

from app.heroes import heroes

PROBLEM = {"Accept": "application/json, application/problem+json"}


def problem(client: httpx2.Client, method: str, path: str, **options: object) -> dict[str, object]:
    """Return the problem; check that the plain error contains the same."""
    plain = client.request(method, path, **options)  # type: ignore[arg-type]
    asked = client.request(method, path, headers=PROBLEM, **options)  # type: ignore[arg-type]
    assert plain.headers["content-type"] == "application/json"
    assert plain.json().keys() == {"detail"}
    assert asked.headers["content-type"] == "application/problem+json"
    assert asked.status_code == plain.status_code == asked.json()["status"]
    members: dict[str, object] = asked.json()
    assert plain.json()["detail"] == members.get("errors", members["detail"])
    assert asked.headers.get("retry-after") == plain.headers.get("retry-after")
    return members


def test_every_kind_of_error_is_a_problem_for_clients_that_accept_it(
    client: httpx2.Client, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problem(client, "GET", "/heroes/1") == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "Hero not found",
    }
    invalid = problem(client, "GET", "/heroes/?limit=0")
    assert invalid["detail"] == "The request is not valid"
    assert invalid["errors"] == [
        {
            "type": "greater_than_equal",
            "loc": ["query", "limit"],
            "msg": "Input should be greater than or equal to 1",
        }
    ]
    assert problem(client, "GET", "/nowhere")["title"] == "Not Found"
    assert problem(client, "PUT", "/heroes/1")["title"] == "Method Not Allowed"
    assert problem(client, "POST", "/heroes/", content=b" " * 70_000)["status"] == 413
    with database.connect() as connection:
        connection.execute(text("ALTER TABLE hero RENAME TO villain"))
    assert problem(client, "GET", "/heroes/")["title"] == "Service Unavailable"

    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(heroes, "get_many", bug)
    assert problem(client, "GET", "/heroes/1")["detail"] == "Internal Server Error"

"""Idempotency keys: a repeated create with the same key creates one hero."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import httpx2
import pytest
from sqlalchemy import URL, DateTime, Engine, bindparam, text

from tests.examples import DEADPOND
from tests.service import Service, serve, settings
from tests.test_tokens import TOKENS, bearer

KEY = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}


def count(database: Engine, table: str = "hero") -> int:
    with database.connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def test_the_same_key_and_body_replay_the_first_response_byte_for_byte(
    client: httpx2.Client, database: Engine
) -> None:
    first = client.post("/heroes/", json=DEADPOND, headers=KEY)
    client.patch(first.headers["location"], json={"name": "Changed"})
    # The same JSON value, formatted differently.
    again = client.post(
        "/heroes",
        content=b'{ "secret_name":"Dive Wilson", "name":"Deadpond" }',
        headers=KEY | {"Content-Type": "application/json"},
    )
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.content == first.content
    for header in ("etag", "location", "content-type"):
        assert again.headers[header] == first.headers[header]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert count(database) == 1


def test_the_same_key_with_another_body_is_422(client: httpx2.Client, database: Engine) -> None:
    client.post("/heroes/", json=DEADPOND, headers=KEY)
    for change in ({"name": "X"}, {"secret_name": "X"}, {"age": 1}):
        refused = client.post("/heroes/", json=DEADPOND | change, headers=KEY)
        assert refused.status_code == 422
        assert refused.json()["detail"] == [
            {
                "type": "value_error",
                "loc": ["header", "idempotency-key"],
                "msg": "Was used with another body",
            }
        ]
    assert count(database) == 1


def test_creates_with_other_keys_or_no_key_are_independent(
    client: httpx2.Client, database: Engine
) -> None:
    for headers in ({}, {}, KEY, {"Idempotency-Key": "x"}, {"Idempotency-Key": "X"}):
        assert client.post("/heroes/", json=DEADPOND, headers=headers).status_code == 200
    assert count(database) == 5


def test_twenty_concurrent_creates_with_one_key_create_one_hero(
    service: Service, database: Engine
) -> None:
    def send(_: int) -> tuple[int, bytes, str, bool]:
        with service.client() as client:
            response = client.post("/heroes/", json=DEADPOND, headers=KEY)
            replayed = "idempotency-replayed" in response.headers
            return response.status_code, response.content, response.headers["etag"], replayed

    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(send, range(20)))
    assert len({response[:3] for response in responses}) == 1
    assert responses[0][0] == 200
    assert sum(not replayed for *_, replayed in responses) == 1
    assert count(database) == 1


def test_a_failed_create_does_not_use_up_its_key(client: httpx2.Client, database: Engine) -> None:
    """One transaction stores the key and inserts the hero."""
    with database.connect() as connection:
        connection.execute(text("ALTER TABLE hero RENAME TO villain"))
    assert client.post("/heroes/", json=DEADPOND, headers=KEY).status_code == 503
    with database.connect() as connection:
        connection.execute(text("ALTER TABLE villain RENAME TO hero"))
    assert count(database, "idempotency_key") == 0
    created = client.post("/heroes/", json=DEADPOND, headers=KEY)
    assert created.status_code == 200
    assert "idempotency-replayed" not in created.headers


def test_a_key_can_be_reused_after_24_hours_and_old_keys_are_deleted(
    client: httpx2.Client, database: Engine
) -> None:
    for number in range(30):
        client.post("/heroes/", json=DEADPOND, headers={"Idempotency-Key": f"old-{number}"})
    client.post("/heroes/", json=DEADPOND, headers={"Idempotency-Key": "young"})
    age = text("UPDATE idempotency_key SET created_at = :then WHERE key LIKE :keys").bindparams(
        bindparam("then", type_=DateTime(timezone=True))
    )
    with database.connect() as connection:
        now = datetime.now(UTC)
        old = {"then": now - timedelta(hours=24, seconds=5), "keys": "old-%"}
        young = {"then": now - timedelta(hours=24) + timedelta(minutes=1), "keys": "young"}
        connection.execute(age, old)
        connection.execute(age, young)

    again = client.post(
        "/heroes/", json={**DEADPOND, "age": 9}, headers={"Idempotency-Key": "old-0"}
    )
    assert again.status_code == 200
    assert "idempotency-replayed" not in again.headers
    for number in range(3):
        client.post("/heroes/", json=DEADPOND, headers={"Idempotency-Key": f"new-{number}"})
    replayed = client.post("/heroes/", json=DEADPOND, headers={"Idempotency-Key": "young"})
    assert replayed.headers["idempotency-replayed"] == "true"
    assert count(database, "idempotency_key") == 5


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "a\tb", "é"])
def test_a_key_that_is_not_1_to_255_visible_characters_is_422(
    client: httpx2.Client, database: Engine, key: str
) -> None:
    headers = {b"Idempotency-Key": key.encode("latin-1")}
    refused = client.post("/heroes/", json=DEADPOND, headers=headers)
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["header", "idempotency-key"]
    assert count(database) == 0


def test_a_key_of_255_visible_characters_is_accepted(client: httpx2.Client) -> None:
    headers = {"Idempotency-Key": "!~" * 127 + "x"}
    assert client.post("/heroes/", json=DEADPOND, headers=headers).status_code == 200
    again = client.post("/heroes/", json=DEADPOND, headers=headers)
    assert again.headers["idempotency-replayed"] == "true"


def test_a_key_belongs_to_its_token(database_url: URL, database: Engine) -> None:
    """A replay for another token would disclose the hero of another client."""
    other = f"other:write:{sha256(b'other').hexdigest()}"
    configured = settings(database_url, api_tokens=f"{TOKENS},{other}")
    with serve(configured) as service, service.client() as client:
        for token in ("open-sesame", "other"):
            created = client.post("/heroes/", json=DEADPOND, headers=KEY | bearer(token))
            assert created.status_code == 200
            assert "idempotency-replayed" not in created.headers
        again = client.post("/heroes/", json=DEADPOND, headers=KEY | bearer("other"))
        assert again.headers["idempotency-replayed"] == "true"
    assert count(database) == 2


def test_bodies_are_compared_as_json_not_as_heroes(client: httpx2.Client, database: Engine) -> None:
    """Otherwise a new column would change the fingerprint of an old body."""
    client.post("/heroes/", json=DEADPOND, headers=KEY)
    refused = client.post("/heroes/", json=DEADPOND | {"age": None}, headers=KEY)
    assert refused.status_code == 422
    assert count(database) == 1

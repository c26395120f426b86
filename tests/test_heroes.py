"""The tutorial's API: every operation with its exact responses."""

import asyncio

import httpx2
import pytest
from sqlalchemy import URL, Engine, event, text

from app.db.database import Database
from app.db.pagination import Page
from app.heroes import heroes
from app.models import HeroCreate, HeroUpdate
from tests.examples import DEADPOND, RUSTY_MAN


def create(client: httpx2.Client, **hero: object) -> int:
    response = client.post("/heroes/", json=DEADPOND | hero)
    assert response.status_code == 200
    return int(response.json()["id"])


def test_create_returns_the_public_hero_byte_for_byte(client: httpx2.Client) -> None:
    response = client.post("/heroes/", json=DEADPOND)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.content == b'{"name":"Deadpond","age":null,"id":1}'


def test_create_stores_the_secret_name_and_no_response_contains_it(
    client: httpx2.Client, database: Engine
) -> None:
    hero_id = create(client)
    everything = [
        client.get("/heroes/").text,
        client.get(f"/heroes/{hero_id}").text,
        client.patch(f"/heroes/{hero_id}", json={"secret_name": "Wade"}).text,
        client.delete(f"/heroes/{hero_id}").text,
    ]
    assert not any("secret" in body or "Wilson" in body or "Wade" in body for body in everything)
    create(client)
    with database.connect() as connection:
        assert connection.scalar(text("SELECT secret_name FROM hero")) == "Dive Wilson"


def test_create_ignores_unknown_members_and_id(client: httpx2.Client) -> None:
    response = client.post("/heroes/", json=DEADPOND | {"id": 77, "powers": ["regenerates"]})
    assert response.json() == {"name": "Deadpond", "age": None, "id": 1}


@pytest.mark.parametrize("name", ["x", "é" * 200, "🦸‍♀️", "'; DROP TABLE hero; --", "\x7f\t\n"])
def test_create_stores_any_valid_text_unchanged(client: httpx2.Client, name: str) -> None:
    hero_id = create(client, name=name)
    assert client.get(f"/heroes/{hero_id}").json()["name"] == name


@pytest.mark.parametrize("age", [None, 0, 1, 2**31 - 1])
def test_create_accepts_every_age_within_the_limits(client: httpx2.Client, age: int | None) -> None:
    assert client.get(f"/heroes/{create(client, age=age)}").json()["age"] == age


def test_list_of_an_empty_table_is_an_empty_array(client: httpx2.Client) -> None:
    response = client.get("/heroes/")
    assert (response.status_code, response.content) == (200, b"[]")


def test_list_is_in_the_order_of_ids_after_an_update(client: httpx2.Client) -> None:
    ids = [create(client, name=f"hero {number}") for number in range(5)]
    client.patch(f"/heroes/{ids[0]}", json={"name": "zzz"})
    assert [hero["id"] for hero in client.get("/heroes/").json()] == ids


def test_list_with_offset_and_limit_returns_that_slice(client: httpx2.Client) -> None:
    ids = [create(client) for _ in range(5)]

    def listed(query: str) -> list[int]:
        return [hero["id"] for hero in client.get(f"/heroes/{query}").json()]

    assert listed("?offset=1&limit=2") == ids[1:3]
    assert listed("?offset=4") == ids[4:]
    assert listed("?offset=0&limit=100") == ids
    assert listed(f"?offset={2**63 - 1}") == []


def test_list_returns_at_most_100_heroes_by_default(
    client: httpx2.Client, database: Engine
) -> None:
    with database.connect() as connection:
        connection.execute(
            text("INSERT INTO hero (name, secret_name) VALUES (:name, 's')"),
            [{"name": str(number)} for number in range(101)],
        )
    assert len(client.get("/heroes/").json()) == 100


def test_get_returns_one_hero(client: httpx2.Client) -> None:
    hero_id = client.post("/heroes/", json=RUSTY_MAN).json()["id"]
    response = client.get(f"/heroes/{hero_id}")
    assert response.status_code == 200
    assert response.json() == {"name": "Rusty-Man", "age": 48, "id": hero_id}


def test_a_missing_hero_is_404(client: httpx2.Client) -> None:
    create(client)
    for hero_id in (2, 0, -1, 2**31, 2**63 - 1, -(2**63)):
        for method in ("GET", "PATCH", "DELETE"):
            response = client.request(method, f"/heroes/{hero_id}", json={"age": 3})
            assert response.status_code == 404
            assert response.json() == {"detail": "Hero not found"}


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "Captain"},
        {"age": 5},
        {"age": None},
        {"name": "Captain", "age": 0},
        {"secret_name": "s", "age": 7, "name": "n"},
        {},
    ],
)
def test_update_changes_only_the_given_fields(
    client: httpx2.Client, database: Engine, changes: dict[str, object]
) -> None:
    other = create(client)
    hero_id = client.post("/heroes/", json=RUSTY_MAN).json()["id"]
    response = client.patch(f"/heroes/{hero_id}", json=changes)

    expected = RUSTY_MAN | changes | {"id": hero_id}
    assert response.status_code == 200
    assert response.json() == {key: expected[key] for key in ("name", "age", "id")}
    with database.connect() as connection:
        rows = connection.execute(text("SELECT * FROM hero ORDER BY id")).mappings().all()
    assert [{key: row[key] for key in expected} for row in rows] == [
        DEADPOND | {"age": None, "id": other},
        expected,
    ]


def test_delete_returns_ok_and_removes_the_hero(client: httpx2.Client) -> None:
    hero_id, other = create(client), create(client)
    response = client.delete(f"/heroes/{hero_id}")
    assert (response.status_code, response.content) == (200, b'{"ok":true}')
    assert client.get(f"/heroes/{hero_id}").status_code == 404
    assert client.delete(f"/heroes/{hero_id}").status_code == 404
    assert client.get(f"/heroes/{other}").status_code == 200


def test_the_path_without_a_trailing_slash_works_without_a_redirect(client: httpx2.Client) -> None:
    created = client.post("/heroes", json=DEADPOND)
    assert (created.status_code, created.json()["id"]) == (200, 1)
    listed = client.get("/heroes")
    assert (listed.status_code, listed.content) == (200, client.get("/heroes/").content)


def test_each_operation_is_exactly_one_statement(database_url: URL) -> None:
    database = Database(database_url, pool_size=1, timeout=5)
    statements: list[str] = []

    async def operations() -> None:
        # A new connection sends its own statements first.
        await database.run(heroes.list, Page(1))
        event.listen(
            database.engine, "before_cursor_execute", lambda *call: statements.append(call[2])
        )
        row = await database.run(heroes.create, HeroCreate.model_validate(DEADPOND))
        await database.run(heroes.get, row.id)
        await database.run(heroes.list, Page(100))
        await database.run(heroes.update, row.id, HeroUpdate(age=3), None)
        await database.run(heroes.delete, row.id, None)
        await database.close()

    asyncio.run(operations())
    words = [statement.split()[0] for statement in statements]
    assert words == ["INSERT", "SELECT", "SELECT", "UPDATE", "DELETE"]
    assert not any("secret_name" in statement for statement in statements[1:])


def test_other_methods_on_import_and_export_are_405(client: httpx2.Client) -> None:
    """They are not matched by the path of one hero, which would return 422 for the id."""
    for path, allowed in (("import", "OPTIONS, POST"), ("export", "GET, HEAD, OPTIONS")):
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - set(allowed.split(", ")):
            refused = client.request(method, f"/heroes/{path}", json={})
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed), method

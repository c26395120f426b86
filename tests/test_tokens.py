"""Bearer tokens for reads and writes."""

from hashlib import sha256

import httpx2
import pytest
from sqlalchemy import URL

from tests.examples import DEADPOND
from tests.service import serve, settings

TOKENS = ",".join(
    f"{name}:{scope}:{sha256(token.encode()).hexdigest()}"
    for name, scope, token in [("ops", "write", "open-sesame"), ("viewer", "read", "peek")]
)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def write(client: httpx2.Client, headers: dict[str, str]) -> list[int]:
    return [
        client.post("/heroes/", json=DEADPOND, headers=headers).status_code,
        client.patch("/heroes/1", json={"age": 1}, headers=headers).status_code,
        client.delete("/heroes/1", headers=headers).status_code,
    ]


def read(client: httpx2.Client, headers: dict[str, str]) -> list[int]:
    return [
        client.get("/heroes/", headers=headers).status_code,
        client.head("/heroes", headers=headers).status_code,
        client.get("/heroes/1", headers=headers).status_code,
        client.get("/heroes/export", headers=headers).status_code,
    ]


def test_with_tokens_configured_reads_need_one_of_any_scope(database_url: URL) -> None:
    configured = settings(database_url, api_tokens=TOKENS)
    with serve(configured) as service, service.client() as client:
        client.post("/heroes/", json=DEADPOND, headers=bearer("open-sesame"))
        assert read(client, {}) == [401, 401, 401, 401]
        assert read(client, bearer("guess")) == [401, 401, 401, 401]
        for token in ("peek", "open-sesame"):
            assert read(client, bearer(token)) == [200, 200, 200, 200]
        for path in ("/docs", "/openapi.json", "/health/ready", "/metrics"):
            assert client.get(path).status_code == 200


def test_reads_stay_open_if_configured(database_url: URL) -> None:
    configured = settings(database_url, api_tokens=TOKENS, api_public_reads="true")
    with serve(configured) as service, service.client() as client:
        client.post("/heroes/", json=DEADPOND, headers=bearer("open-sesame"))
        assert read(client, {}) == [200, 200, 200, 200]
        assert write(client, {}) == [401, 401, 401]


def test_with_tokens_configured_writes_need_one_with_the_scope_write(database_url: URL) -> None:
    configured = settings(database_url, api_tokens=TOKENS)
    with serve(configured) as service, service.client() as client:
        assert write(client, {}) == [401, 401, 401]
        assert write(client, bearer("guess")) == [401, 401, 401]
        assert write(client, {"Authorization": "Basic b3BzOng="}) == [401, 401, 401]
        assert write(client, bearer("peek")) == [403, 403, 403]
        assert write(client, bearer("open-sesame")) == [200, 200, 200]
        refused = client.post("/heroes/", json=DEADPOND)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json() == {"detail": "Not authenticated"}
        schema = client.get("/openapi.json").json()
        assert schema["paths"]["/heroes/"]["post"]["security"] == [{"HTTPBearer": []}]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_without_tokens_everything_is_open_and_the_docs_do_not_mention_them(
    client: httpx2.Client,
) -> None:
    client.post("/heroes/", json=DEADPOND)
    assert read(client, {}) == [200, 200, 200, 200]
    assert write(client, {}) == [200, 200, 200]
    assert "security" not in client.get("/openapi.json").text

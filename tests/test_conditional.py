"""ETags (RFC 9110): an unchanged hero is not sent, and a changed hero is not overwritten."""

from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from app.db import etags
from tests.examples import DEADPOND
from tests.service import Service


@pytest.fixture
def path(client: httpx2.Client) -> str:
    created = client.post("/heroes/", json=DEADPOND)
    assert created.headers["location"] == f"/heroes/{created.json()['id']}"
    return str(created.headers["location"])


def test_the_etag_stays_the_same_until_a_change(client: httpx2.Client, path: str) -> None:
    first = client.get(path).headers["etag"]
    assert client.get(path).headers["etag"] == first
    second = client.patch(path, json={"age": 3})
    assert second.headers["etag"] != first
    assert client.get(path).headers["etag"] == second.headers["etag"]
    # A change of only the secret name also makes the copies of other clients stale.
    third = client.patch(path, json={"secret_name": "x"}).headers["etag"]
    assert third != second.headers["etag"]
    assert client.patch(path, json={}).headers["etag"] == third


def test_create_returns_the_etag_of_the_new_hero(client: httpx2.Client) -> None:
    created = client.post("/heroes", json=DEADPOND)
    assert client.get(created.headers["location"]).headers["etag"] == created.headers["etag"]


NONE_MATCH = {
    '"1"': 304,
    'W/"1"': 304,
    "*": 304,
    '"0", "1"': 304,
    '"a,b" ,W/"1"': 304,
    '"2"': 200,
    '"01"': 200,
    '""': 200,
    "1": 422,
    '"1': 422,
    '"1" "2"': 422,
    "": 422,
    ",": 422,
    'w/"1"': 422,
    '*, "1"': 422,
}


def test_get_with_if_none_match(client: httpx2.Client, path: str) -> None:
    for header, status in NONE_MATCH.items():
        response = client.get(path, headers={"If-None-Match": header})
        assert response.status_code == status, header
        if status == 304:
            assert response.content == b""
            assert response.headers["etag"] == '"1"'
        if status == 422:
            assert response.json()["detail"][0]["loc"] == ["header", "if-none-match"]


MATCH = {
    '"1"': 200,
    "*": 200,
    '"0", "1"': 200,
    'W/"1"': 412,
    '"2"': 412,
    '"99999999999999999999"': 412,
    '"9999999999"': 412,
    '"a,b"': 412,
    "1": 422,
    "": 422,
}


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
def test_update_and_delete_with_if_match(client: httpx2.Client, method: str) -> None:
    for header, status in MATCH.items():
        path = client.post("/heroes/", json=DEADPOND).headers["location"]
        response = client.request(method, path, json={"age": 3}, headers={"If-Match": header})
        assert response.status_code == status, header
        if status != 200:
            assert client.get(path).headers["etag"] == '"1"'
        if status == 412:
            assert response.json() == {"detail": "The hero has changed"}


def test_an_update_without_changes_checks_its_precondition(
    client: httpx2.Client, path: str
) -> None:
    assert client.patch(path, json={}, headers={"If-Match": '"2"'}).status_code == 412
    assert client.patch(path, json={}, headers={"If-Match": '"1"'}).status_code == 200


@pytest.mark.parametrize("header", ["*", '"1"'])
@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
def test_a_precondition_on_a_missing_hero_is_404(
    client: httpx2.Client, method: str, header: str
) -> None:
    response = client.request(method, "/heroes/9", json={"age": 3}, headers={"If-Match": header})
    assert response.status_code == 404


def send_concurrently(
    service: Service, requests: list[tuple[str, str, dict[str, str]]]
) -> list[int]:
    def send(request: tuple[str, str, dict[str, str]]) -> int:
        method, path, headers = request
        with service.client() as client:
            return client.request(method, path, json={"age": 3}, headers=headers).status_code

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(send, requests))


def test_one_of_twenty_concurrent_updates_with_the_same_etag_succeeds(
    service: Service, path: str
) -> None:
    statuses = send_concurrently(service, [("PATCH", path, {"If-Match": '"1"'})] * 20)
    assert sorted(statuses) == [200] + [412] * 19


def test_concurrent_updates_and_deletes_never_fail(service: Service, client: httpx2.Client) -> None:
    for _ in range(5):
        path = client.post("/heroes/", json=DEADPOND).headers["location"]
        conditional = {"If-Match": '"1"'}
        requests = [("PATCH", path, dict[str, str]()), ("DELETE", path, {})] * 4
        requests += [("PATCH", path, conditional), ("DELETE", path, conditional)]
        assert set(send_concurrently(service, requests)) <= {200, 404, 412}
        assert client.get(path).status_code == 404


def test_an_etag_matches_only_its_own_version() -> None:
    assert etags.versions(etags.from_version(12)) == frozenset({12})
    assert etags.matches(etags.from_version(12), 12)
    assert not etags.matches(etags.from_version(12), 2)

"""The documentation: the tutorial's, served from here."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from tests.service import serve, settings

# What FastAPI generates for the tutorial's own code.
TUTORIAL = {
    ("/heroes/", "post"): ("create_hero_heroes__post", "Create Hero"),
    ("/heroes/", "get"): ("read_heroes_heroes__get", "Read Heroes"),
    ("/heroes/{hero_id}", "get"): ("read_hero_heroes__hero_id__get", "Read Hero"),
    ("/heroes/{hero_id}", "patch"): ("update_hero_heroes__hero_id__patch", "Update Hero"),
    ("/heroes/{hero_id}", "delete"): ("delete_hero_heroes__hero_id__delete", "Delete Hero"),
}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    file = tmp_path_factory.mktemp("openapi") / "heroes.db"
    with serve(settings(make_url(f"sqlite:///{file}"))) as service, service.client() as client:
        yield client.get("/openapi.json").json()


def test_the_paths_and_operations_are_the_tutorials(schema: dict[str, Any]) -> None:
    operations = {
        (path, method): (operation["operationId"], operation["summary"])
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }
    assert operations == TUTORIAL


def test_the_schemas_are_the_tutorials(schema: dict[str, Any]) -> None:
    members = {
        name: (list(model["properties"]), model.get("required", []))
        for name, model in schema["components"]["schemas"].items()
        if name.startswith("Hero")
    }
    assert members == {
        "HeroCreate": (["name", "age", "secret_name"], ["name", "secret_name"]),
        "HeroPublic": (["name", "age", "id"], ["name", "id"]),
        "HeroUpdate": (["name", "age", "secret_name"], []),
    }
    answer = schema["paths"]["/heroes/"]["get"]["responses"]["200"]["content"]["application/json"]
    assert answer["schema"]["items"] == {"$ref": "#/components/schemas/HeroPublic"}


def test_the_docs_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    configured = settings(make_url(f"sqlite:///{tmp_path}/heroes.db"))
    with serve(configured) as service, service.client() as client:
        page = client.get("/docs")
        assert page.status_code == 200
        assert "://" not in page.text
        loaded = re.findall(r'(?:href|src)="([^"]+)"', page.text)
        assert len(loaded) >= 3
        for path in loaded:
            assert client.get(path).status_code == 200

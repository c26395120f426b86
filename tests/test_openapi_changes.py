"""docs/openapi.json is current, and the changelog names every breaking change since the release."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.openapi import document
from tests.service import ROOT

Schema = dict[str, Any]
CURRENT: Schema = json.loads((ROOT / "docs" / "openapi.json").read_text())
RELEASES = {
    tuple(int(number) for number in re.findall(r"\d+", file.name)): file
    for file in (ROOT / "tests" / "releases").glob("openapi-*.json")
}
RELEASED: Schema = json.loads(RELEASES[max(RELEASES)].read_text())

# Constraints that allow less if they rise, and those that allow less if they fall.
LOWER_LIMITS = ("minimum", "exclusiveMinimum", "minLength", "minItems")
UPPER_LIMITS = ("maximum", "exclusiveMaximum", "maxLength", "maxItems")


def breaking_changes(old: Schema, new: Schema) -> Iterator[tuple[str, str]]:
    """Yield each operation of `old` that clients cannot use as before, and the reason."""
    for path, operations in old["paths"].items():
        for method, before in operations.items():
            name = f"{method.upper()} {path}"
            after = new["paths"].get(path, {}).get(method)
            if after is None:
                yield name, "was removed"
                continue
            if before["operationId"] != after["operationId"]:
                yield name, "has another operationId"
            for reason in _parameters(before, after, old, new):
                yield name, reason
            body, next_body = before.get("requestBody", {}), after.get("requestBody", {})
            if next_body.get("required") and not body.get("required"):
                yield name, "requires a body"
            for reason in _contents("the request", body, next_body, old, new, is_request=True):
                yield name, reason
            for status, response in before["responses"].items():
                if status not in after["responses"]:
                    if status < "4":
                        yield name, f"no longer responds {status}"
                    continue
                later = after["responses"][status]
                for header in response.get("headers", {}).keys() - later.get("headers", {}).keys():
                    yield name, f"the header {header} of the {status} was removed"
                where = f"the {status}"
                for reason in _contents(where, response, later, old, new, is_request=False):
                    yield name, reason


def _parameters(before: Schema, after: Schema, old: Schema, new: Schema) -> Iterator[str]:
    earlier = {(each["in"], each["name"]): each for each in before.get("parameters", [])}
    later = {(each["in"], each["name"]): each for each in after.get("parameters", [])}
    for key, parameter in later.items():
        if parameter.get("required") and not earlier.get(key, {}).get("required"):
            yield f"requires the parameter {key[1]}"
    for key, parameter in earlier.items():
        where = f"the parameter {key[1]}"
        if key not in later:
            yield f"{where} was removed"
        else:
            yield from _refused(
                where, parameter["schema"], later[key]["schema"], old, new, is_request=True
            )


def _contents(
    where: str, before: Schema, after: Schema, old: Schema, new: Schema, *, is_request: bool
) -> Iterator[str]:
    for media_type, content in before.get("content", {}).items():
        later = after.get("content", {}).get(media_type)
        if later is None:
            yield f"{where} no longer has the type {media_type}"
        else:
            schemas = content["schema"], later["schema"]
            yield from _refused(where, *schemas, old, new, is_request=is_request)


def _refused(
    where: str, before: Schema, after: Schema, old: Schema, new: Schema, *, is_request: bool
) -> Iterator[str]:
    """Yield the differences that break a client.

    A request that `before` allows must be allowed by `after`. A response that `after` allows must
    be one that `before` allows. Additional members break neither.
    """
    earlier, later = _alternatives(before, old), _alternatives(after, new)
    wide, narrow = (earlier, later) if is_request else (later, earlier)
    for kind in wide.keys() - narrow.keys():
        yield f"{where} may {'no longer' if is_request else 'now'} be {kind}"
    for kind in wide.keys() & narrow.keys():
        yield from _constraints(where, wide[kind], narrow[kind], is_request=is_request)
    for kind in earlier.keys() & later.keys():
        one, other = earlier[kind], later[kind]
        if "items" in one and "items" in other:
            yield from _refused(
                f"{where}[]", one["items"], other["items"], old, new, is_request=is_request
            )
        members, next_members = one.get("properties", {}), other.get("properties", {})
        for name, member in members.items():
            if name not in next_members:
                yield f"the member {name} of {where} was removed"
            else:
                inside = f"{name} of {where}"
                next_member = next_members[name]
                yield from _refused(inside, member, next_member, old, new, is_request=is_request)


def _constraints(where: str, wide: Schema, narrow: Schema, *, is_request: bool) -> Iterator[str]:
    """Yield the constraints of `narrow` that refuse values that `wide` allows."""
    for name in set(narrow.get("required", ())) - set(wide.get("required", ())):
        yield f"the member {name} of {where} " + ("is required" if is_request else "may be missing")
    for key in LOWER_LIMITS:
        if key in narrow and narrow[key] > wide.get(key, float("-inf")):
            yield f"{key} of {where} differs"
    for key in UPPER_LIMITS:
        if key in narrow and narrow[key] < wide.get(key, float("inf")):
            yield f"{key} of {where} differs"
    for key in ("pattern", "format", "multipleOf"):
        if key in narrow and narrow[key] != wide.get(key):
            yield f"{key} of {where} differs"
    values = _values(narrow)
    if values and not (_values(wide) and _values(wide) <= values):
        yield f"the values of {where} differ"


def _values(schema: Schema) -> set[Any]:
    return set(schema.get("enum", [schema["const"]] if "const" in schema else []))


def _alternatives(schema: Schema, document: Schema) -> dict[str, Schema]:
    """Return a schema for each type that the schema allows."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _alternatives(document["components"]["schemas"][name], document)
    found: dict[str, Schema] = {}
    for each in schema.get("anyOf", []):
        found |= _alternatives(each, document)
    kinds = schema.get("type", ())
    return found | dict.fromkeys([kinds] if isinstance(kinds, str) else kinds, schema)


def unreleased() -> str:
    """Return the section "Unreleased" of the changelog."""
    changelog = ROOT / "CHANGELOG.md"
    text = changelog.read_text() if changelog.exists() else ""
    found = re.search(r"^## \[?Unreleased.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[0] if found else ""


def test_the_document_is_current() -> None:
    assert (ROOT / "docs" / "openapi.json").read_text() == document(), "run: make openapi"


def test_the_changelog_names_every_operation_with_a_breaking_change() -> None:
    changes = sorted(set(breaking_changes(RELEASED, CURRENT)))
    section = unreleased()
    assert [f"{name}: {reason}" for name, reason in changes if name not in section] == []


def schemas(document: Schema) -> Schema:
    found: Schema = document["components"]["schemas"]
    return found


def age(document: Schema, model: str) -> Schema:
    """Return the integer's schema."""
    [integer] = [
        each
        for each in schemas(document)[model]["properties"]["age"]["anyOf"]
        if each["type"] == "integer"
    ]
    found: Schema = integer
    return found


def parameter(document: Schema, name: str) -> Schema:
    parameters: list[Schema] = document["paths"]["/heroes/"]["get"]["parameters"]
    [found] = [each for each in parameters if each["name"] == name]
    return found


BREAKING: dict[str, tuple[str, Callable[[Schema], object]]] = {
    "a path is removed": (
        "GET /heroes/export",
        lambda new: new["paths"].pop("/heroes/export"),
    ),
    "an operation is removed": (
        "DELETE /heroes/{hero_id}",
        lambda new: new["paths"]["/heroes/{hero_id}"].pop("delete"),
    ),
    "an operation is renamed": (
        "POST /heroes/",
        lambda new: new["paths"]["/heroes/"]["post"].update(operationId="new_hero"),
    ),
    "a member of a response is removed": (
        "GET /heroes/",
        lambda new: schemas(new)["HeroPublic"]["properties"].pop("age"),
    ),
    "a member of a response is no longer always there": (
        "GET /heroes/{hero_id}",
        lambda new: schemas(new)["HeroPublic"]["required"].remove("name"),
    ),
    "a member of a response has another type": (
        "GET /heroes/{hero_id}",
        lambda new: schemas(new)["HeroPublic"]["properties"]["id"].update(type="string"),
    ),
    "a member of a request is removed": (
        "POST /heroes/",
        lambda new: schemas(new)["HeroCreate"]["properties"].pop("age"),
    ),
    "a member of a request is required": (
        "POST /heroes/",
        lambda new: schemas(new)["HeroCreate"]["required"].append("age"),
    ),
    "a member of a request may not be null": (
        "POST /heroes/",
        lambda new: schemas(new)["HeroCreate"]["properties"].update(age=age(new, "HeroCreate")),
    ),
    "a limit of a request is lower": (
        "PATCH /heroes/{hero_id}",
        lambda new: age(new, "HeroUpdate").update(maximum=150),
    ),
    "a limit of a request is new": (
        "POST /heroes/",
        lambda new: schemas(new)["HeroCreate"]["properties"]["name"].update(pattern="^[a-z]+$"),
    ),
    "a parameter is removed": (
        "GET /heroes/",
        lambda new: new["paths"]["/heroes/"]["get"]["parameters"].pop(),
    ),
    "a parameter is required": (
        "GET /heroes/",
        lambda new: parameter(new, "limit").update(required=True),
    ),
    "a value of a parameter is refused": (
        "GET /heroes/",
        lambda new: parameter(new, "sort")["schema"]["enum"].remove("-age"),
    ),
    "a type of a body is refused": (
        "POST /heroes/import",
        lambda new: new["paths"]["/heroes/import"]["post"]["requestBody"]["content"].pop(
            "text/csv"
        ),
    ),
    "a header of a response is removed": (
        "POST /heroes/",
        lambda new: new["paths"]["/heroes/"]["post"]["responses"]["200"]["headers"].pop("Location"),
    ),
}


@pytest.mark.parametrize(("operation", "change"), BREAKING.values(), ids=BREAKING)
def test_a_breaking_change_is_found(operation: str, change: Callable[[Schema], object]) -> None:
    new = copy.deepcopy(CURRENT)
    change(new)
    assert new != CURRENT
    assert operation in dict(breaking_changes(CURRENT, new))


HARMLESS: dict[str, Callable[[Schema], object]] = {
    "a path is new": lambda new: new["paths"].update({"/villains/": {}}),
    "a member of a response is new": lambda new: schemas(new)["HeroPublic"]["properties"].update(
        power={"type": "string"}
    ),
    "an optional member of a request is new": lambda new: schemas(new)["HeroCreate"][
        "properties"
    ].update(power={"type": "string"}),
    "a limit of a request is higher": lambda new: age(new, "HeroCreate").pop("maximum"),
    "a limit of a response is lower": lambda new: age(new, "HeroPublic").update(maximum=150),
    "a parameter is new": lambda new: new["paths"]["/heroes/"]["get"]["parameters"].append(
        {"in": "query", "name": "power", "schema": {"type": "string"}}
    ),
    "a value of a parameter is new": lambda new: parameter(new, "sort")["schema"]["enum"].append(
        "power"
    ),
    "a description is new": lambda new: new["info"].update(description="Heroes"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_a_harmless_change_is_not_reported(change: Callable[[Schema], object]) -> None:
    new = copy.deepcopy(CURRENT)
    change(new)
    assert new != CURRENT
    assert list(breaking_changes(CURRENT, new)) == []

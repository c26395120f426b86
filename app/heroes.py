"""What can be done with heroes: the statements, built once, and a plain function for each.

Each function runs exactly one statement, so that it is atomic by itself and one round trip. None
of them reads `secret_name`.
"""

import json
from functools import cache
from itertools import combinations
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Select,
    bindparam,
    delete,
    func,
    insert,
    tuple_,
    union_all,
    update,
)
from sqlmodel import Session, SQLModel, select

from app.models import Hero, HeroCreate, HeroUpdate
from app.pages import Cursor, Sort


class HeroRow(NamedTuple):
    """What is ever read of a row."""

    id: int
    name: str
    age: int | None
    version: int

    def json(self) -> bytes:
        """The hero as `HeroPublic` writes it."""
        age = "null" if self.age is None else self.age
        return f'{{"name":{encode_basestring(self.name)},"age":{age},"id":{self.id}}}'.encode()


class Listing(NamedTuple):
    """Which heroes a list has, in which order, and which part of them."""

    limit: int
    offset: int = 0
    sort: Sort = "id"
    after: Cursor | None = None
    name: str | None = None
    age_min: int | None = None
    age_max: int | None = None


# Columns of the table and not of the class: rows need no entities made and tracked for them.
_hero = SQLModel.metadata.tables[str(Hero.__tablename__)]
_id, _name, _age = _hero.c.id, _hero.c.name, _hero.c.age
_row = (_id, _name, _age, _hero.c.version)
# Bound as bigint whatever the column is, so that an id that cannot exist is merely not found.
_by_id = _id == bindparam("hero_id", type_=BigInteger)
_of_version = _hero.c.version.in_(bindparam("versions", expanding=True))

_CREATE = insert(_hero).returning(*_row)
_GET = select(*_row).where(_by_id)
# However many ids, one statement with one parameter.
_GET_ALL = {
    "postgresql": select(*_row).where(_id == func.any(bindparam("ids", type_=ARRAY(BigInteger)))),
    "sqlite": select(*_row).where(
        _id.in_(select(func.json_each(bindparam("ids")).table_valued("value").c.value))
    ),
}
# One statement for each set of members that a request can change.
_members = tuple(HeroUpdate.model_fields)
_UPDATE = {
    frozenset(members): update(_hero)
    .where(_by_id)
    .values({member: bindparam(f"new_{member}") for member in members})
    .values(version=_hero.c.version + 1)
    .returning(*_row)
    for count in range(1, len(_members) + 1)
    for members in combinations(_members, count)
}
_DELETE = delete(_hero).where(_by_id).returning(_id)

_FILTERS: dict[str, ColumnElement[bool]] = {
    "name": _name == bindparam("name"),
    "age_min": _age >= bindparam("age_min"),
    "age_max": _age <= bindparam("age_max"),
}


def create(session: Session, hero: HeroCreate) -> HeroRow:
    """Inserts the hero and returns it with its new id."""
    return HeroRow._make(session.exec(_CREATE, params=hero.model_dump()).one())


def read(session: Session, listing: Listing) -> list[HeroRow]:
    """The heroes of the listing, in its order; `limit` of them at most."""
    filters = _given(listing)
    parameters = filters | {"limit": listing.limit, "offset": listing.offset}
    position: Literal["start", "value", "null"] = "start"
    if listing.after:
        position = "null" if listing.after.value is None else "value"
        parameters |= {"after_value": listing.after.value, "after_id": listing.after.id}
    statement = _read(listing.sort, frozenset(filters), position)
    return [HeroRow._make(row) for row in session.exec(statement, params=parameters).all()]


def count(session: Session, listing: Listing) -> int:
    """How many heroes the listing has in all its pages."""
    filters = _given(listing)
    return int(session.exec(_count(frozenset(filters)), params=filters).one())


def get(session: Session, hero_id: int) -> HeroRow | None:
    """The hero with this id, or None."""
    row = session.exec(_GET, params={"hero_id": hero_id}).one_or_none()
    return HeroRow._make(row) if row else None


def get_all(session: Session, ids: list[int]) -> list[HeroRow]:
    """Those of the heroes with these ids that are there, in no order."""
    dialect = session.get_bind().dialect.name
    parameter = ids if dialect == "postgresql" else json.dumps(ids)
    rows = session.exec(_GET_ALL[dialect], params={"ids": parameter})
    return [HeroRow._make(row) for row in rows.all()]


def change(
    session: Session, hero_id: int, hero: HeroUpdate, versions: frozenset[int] | None = None
) -> HeroRow | None:
    """Writes the members that are set and returns the whole hero.

    None where there is none, or where it is at none of the `versions`.
    """
    changes = hero.model_dump(exclude_unset=True)
    if not changes:
        row = get(session, hero_id)
        return row if row and (versions is None or row.version in versions) else None
    statement = _UPDATE[frozenset(changes)]
    parameters: dict[str, Any] = {f"new_{member}": value for member, value in changes.items()}
    parameters["hero_id"] = hero_id
    if versions is not None:
        statement = statement.where(_of_version)
        parameters["versions"] = list(versions)
    changed = session.exec(statement, params=parameters).one_or_none()
    return HeroRow._make(changed) if changed else None


def remove(session: Session, hero_id: int, versions: frozenset[int] | None = None) -> bool:
    """Deletes the hero, if it is at one of the `versions`; says whether it did."""
    statement, parameters = _DELETE, dict[str, Any](hero_id=hero_id)
    if versions is not None:
        statement = statement.where(_of_version)
        parameters["versions"] = list(versions)
    return session.exec(statement, params=parameters).one_or_none() is not None


def _given(listing: Listing) -> dict[str, Any]:
    filters = {name: getattr(listing, name) for name in _FILTERS}
    return {name: value for name, value in filters.items() if value is not None}


@cache
def _count(filters: frozenset[str]) -> Any:
    return select(func.count()).select_from(_hero).where(*(_FILTERS[name] for name in filters))


@cache
def _read(sort: Sort, filters: frozenset[str], position: Literal["start", "value", "null"]) -> Any:
    """The statement of a page that begins at the start, or behind a hero that has a value or null.

    Behind a hero every page is a range of one index, however far down the list it is.
    """
    chosen = select(*_row).where(*(_FILTERS[name] for name in filters))
    if position == "start":
        offset = bindparam("offset", type_=BigInteger)
        return _page(chosen, sort).offset(offset)

    descending = sort.startswith("-")
    after_id = bindparam("after_id", type_=BigInteger)
    if sort.endswith("id"):
        return _page(chosen.where(_id < after_id if descending else _id > after_id), sort)

    column = _name if sort.endswith("name") else _age
    if position == "value":
        here = tuple_(column, _id)
        there = tuple_(bindparam("after_value", type_=column.type), after_id)
        behind = chosen.where(here < there if descending else here > there)
    else:
        behind = chosen.where(_age.is_(None), _id < after_id if descending else _id > after_id)
    # NULL is no part of the range above: where the other kind of heroes comes next, it is a second
    # range, and of both together one page is taken.
    crossing = sort.endswith("age") and descending == (position == "null")
    if not crossing:
        return _page(behind, sort)
    others = chosen.where(_age.is_not(None) if descending else _age.is_(None))
    ranges = (_page(range_, sort).subquery().select() for range_ in (behind, others))
    both = union_all(*ranges).subquery()
    return _page(both.select(), sort, both.c)


def _page(chosen: Select[Any], sort: Sort, columns: Any = _hero.c) -> Select[Any]:
    """Of the chosen heroes the first `limit` in this order."""
    keys = [columns[sort.removeprefix("-")], columns["id"]]
    if sort.startswith("-"):
        order = [keys[0].desc().nulls_first(), keys[1].desc()]
    else:
        order = [keys[0].asc().nulls_last(), keys[1].asc()]
    if sort.endswith("id"):
        order = order[1:]
    elif sort.endswith("name"):  # Never null.
        order[0] = keys[0].desc() if sort.startswith("-") else keys[0].asc()
    return chosen.order_by(*order).limit(bindparam("limit"))

"""Requests that are safe to retry: the `Idempotency-Key` header.

https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlmodel import Session, SQLModel

from app.errors import KeyReused

LIFETIME = timedelta(hours=24)

_table = sa.Table(
    "idempotency_key",
    SQLModel.metadata,
    sa.Column("route", sa.String, nullable=False),
    sa.Column("principal", sa.String, nullable=False),
    sa.Column("key", sa.String, nullable=False),
    sa.Column("fingerprint", sa.String, nullable=False),
    # The response. Null only within the transaction that claims the key.
    sa.Column("status", sa.Integer),
    sa.Column("headers", sa.String),
    sa.Column("body", sa.String),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint("route", "principal", "key", name="idempotency_key_pkey"),
    sa.Index("ix_idempotency_key_created_at", "created_at"),
)

# In text, because SQLAlchemy has ON CONFLICT only per dialect. The statement waits for a concurrent
# request with the same key and then returns no row. An expired key counts as unused.
_CLAIM = sa.text(
    "INSERT INTO idempotency_key (route, principal, key, fingerprint, created_at)"
    " VALUES (:route, :principal, :key, :fingerprint, :now)"
    " ON CONFLICT (route, principal, key) DO UPDATE SET fingerprint = :fingerprint,"
    " created_at = :now, status = NULL, headers = NULL, body = NULL"
    " WHERE idempotency_key.created_at < :expired RETURNING key"
).bindparams(
    sa.bindparam("now", type_=sa.DateTime(timezone=True)),
    sa.bindparam("expired", type_=sa.DateTime(timezone=True)),
)
_primary_key = tuple(_table.primary_key)
_is_key = [column == sa.bindparam(f"its_{column.name}") for column in _primary_key]
# Sets the columns of its parameters: status, headers and body.
_STORE = sa.update(_table).where(*_is_key)
_GET = sa.select(_table.c.fingerprint, _table.c.status, _table.c.headers, _table.c.body).where(
    *_is_key
)
# Each new key deletes a few expired ones, so the table stays small without a scheduled job.
_PRUNE = sa.delete(_table).where(
    sa.tuple_(*_primary_key).in_(
        sa.select(*_primary_key)
        .where(_table.c.created_at < sa.bindparam("expired"))
        .order_by(_table.c.created_at)
        .limit(10)
        .with_for_update(skip_locked=True)
    )
)


class Key(NamedTuple):
    """An idempotency key in its scope, and the fingerprint of the request that sent it."""

    route: str
    principal: str
    key: str
    fingerprint: str


class StoredResponse(NamedTuple):
    """The first response to a key. The body is text."""

    status: int
    headers: dict[str, str]
    body: str


def fingerprint(value: Any) -> str:
    """Return a digest of a JSON value. Spaces and the order of members do not matter.

    Taken before validation: a release that knows more members computes the same digest.
    """
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def run_once(
    session: Session, key: Key, respond: Callable[[Session], StoredResponse]
) -> tuple[StoredResponse, bool]:
    """Run `respond` once per key, and return its response. The flag tells whether it is a replay.

    Must run in a transaction, which claims the key and commits with the changes of `respond`. A key
    lives for `LIFETIME`. Raises `KeyReused` if the key was used with another fingerprint.
    """
    now = datetime.now(UTC)
    expired = {"expired": now - LIFETIME}
    its_key = {"its_route": key.route, "its_principal": key.principal, "its_key": key.key}
    connection = session.connection()
    if connection.execute(_CLAIM, {**key._asdict(), **expired, "now": now}).one_or_none():
        response = respond(session)
        stored = response._asdict() | {"headers": json.dumps(response.headers)}
        connection.execute(_STORE, stored | its_key)
        connection.execute(_PRUNE, expired)
        return response, False
    found = connection.execute(_GET, its_key).one()
    if found.fingerprint != key.fingerprint:
        raise KeyReused
    return StoredResponse(found.status, json.loads(found.headers), found.body), True

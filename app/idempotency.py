"""A create that is safe to retry: the `Idempotency-Key` header's semantics.

https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
"""

import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from sqlalchemy import DateTime, bindparam, delete, text, update
from sqlmodel import Session, SQLModel, select

from app import heroes
from app.errors import KeyReused
from app.heroes import HeroRow
from app.models import HeroCreate, IdempotencyKey

KEPT = timedelta(hours=24)

_key = SQLModel.metadata.tables[str(IdempotencyKey.__tablename__)]

# Both databases have this statement, which SQLAlchemy has only in two dialects of its own. It waits
# for another request with the same key, and then returns no row; an expired key is a new one.
_CLAIM = text(
    "INSERT INTO idempotency_key (key, fingerprint, created_at) VALUES (:key, :fingerprint, :now)"
    " ON CONFLICT (key) DO UPDATE SET fingerprint = :fingerprint, created_at = :now, answer = NULL"
    " WHERE idempotency_key.created_at < :expired RETURNING key"
).bindparams(
    bindparam("now", type_=DateTime(timezone=True)),
    bindparam("expired", type_=DateTime(timezone=True)),
)
_ANSWER = update(_key).where(_key.c.key == bindparam("of_key")).values(answer=bindparam("answered"))
_GET = select(_key.c.fingerprint, _key.c.answer).where(_key.c.key == bindparam("of_key"))
# A few with each new key keep the table as small as a day's keys, without anything to schedule.
_PRUNE = delete(_key).where(
    _key.c.key.in_(
        select(_key.c.key)
        .where(_key.c.created_at < bindparam("expired"))
        .order_by(_key.c.created_at)
        .limit(10)
        .with_for_update(skip_locked=True)
    )
)


def create(session: Session, key: str, hero: HeroCreate) -> tuple[HeroRow, bool]:
    """Creates the hero once for this key: later calls return the first one's row, and True.

    To be run in a transaction, in which the key is claimed and the hero inserted together. Raises
    `KeyReused` where the key came with another hero in the last `KEPT`.
    """
    now = datetime.now(UTC)
    expired = {"expired": now - KEPT}
    # Of the hero as it was understood: a retry may write the same JSON in another way.
    fingerprint = sha256(json.dumps(hero.model_dump(), sort_keys=True).encode()).hexdigest()
    claim = {"key": key, "fingerprint": fingerprint, "now": now} | expired
    if session.connection().execute(_CLAIM, claim).one_or_none():
        row = heroes.create(session, hero)
        session.exec(_ANSWER, params={"of_key": key, "answered": json.dumps(row)})
        session.exec(_PRUNE, params=expired)
        return row, False
    of_the_first, answer = session.exec(_GET, params={"of_key": key}).one()
    if of_the_first != fingerprint:
        raise KeyReused
    return HeroRow._make(json.loads(answer)), True

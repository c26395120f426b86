"""The schema revision that the code was written for, against the one that the database is at."""

from pathlib import Path
from typing import NamedTuple, Self

from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import String, column, table
from sqlmodel import Session, select

from app.errors import SchemaBehind

ALEMBIC_INI = Path(__file__).parents[1] / "alembic.ini"

_CURRENT = select(table("alembic_version", column("version_num", String)).c.version_num)


def current(session: Session) -> set[str]:
    """The revisions that the database is at: one, or none before the first migration."""
    return set(session.exec(_CURRENT))


class Revisions(NamedTuple):
    """The code's history of the schema: its newest revision, and all of them."""

    head: str
    known: frozenset[str]

    @classmethod
    def of_the_code(cls) -> Self:
        """Reads the migration scripts. Raises alembic's `CommandError` where they are broken."""
        scripts = ScriptDirectory.from_config(Config(ALEMBIC_INI))
        known = frozenset(script.revision for script in scripts.walk_revisions())
        return cls(scripts.get_current_head() or "base", known)

    def check(self, session: Session) -> None:
        """Returns when this code can work on the database's schema; else raises `SchemaBehind`.

        A revision that this code does not know is a newer release's, whose schema serves the
        release before it too.
        """
        at = current(session)
        if self.head in at or at - self.known:
            return
        raise SchemaBehind(f"it is at {', '.join(at) or 'no revision'}, the code at {self.head}")

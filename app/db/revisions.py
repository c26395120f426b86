"""The schema revision that the code needs, compared with the revision of the database."""

from pathlib import Path
from typing import NamedTuple, Self

from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import String, column, table
from sqlmodel import Session, select

from app.errors import SchemaBehind

ALEMBIC_INI = Path(__file__).parents[2] / "alembic.ini"

_CURRENT = select(table("alembic_version", column("version_num", String)).c.version_num)


def current(session: Session) -> set[str]:
    """Return the revisions of the database: one, or none before the first migration."""
    return set(session.exec(_CURRENT))


class Revisions(NamedTuple):
    """The newest revision that the code knows, and all revisions that it knows."""

    head: str
    known: frozenset[str]

    @classmethod
    def of_the_code(cls) -> Self:
        """Read the migration scripts. Raises alembic's `CommandError` if they are broken."""
        scripts = ScriptDirectory.from_config(Config(ALEMBIC_INI))
        known = frozenset(script.revision for script in scripts.walk_revisions())
        return cls(scripts.get_current_head() or "base", known)

    def check(self, session: Session) -> None:
        """Return if this code works with the database's schema, else raise `SchemaBehind`.

        An unknown revision belongs to a newer release. Its schema serves the previous release too.
        """
        found = current(session)
        if self.head in found or found - self.known:
            return
        raise SchemaBehind(f"it is at {', '.join(found) or 'no revision'}, the code at {self.head}")

"""The schema revision that the code needs, compared with the revision of the database."""

from pathlib import Path
from typing import NamedTuple, Self

from alembic.script import ScriptDirectory
from sqlalchemy import Connection, String, column, table, text
from sqlmodel import Session, select

from app.db.admission import reads
from app.errors import SchemaBehind, WrongDatabase

# The wheel has the scripts inside the package: see pyproject.toml.
_PACKAGED = Path(__file__).parents[1] / "alembic"
SCRIPTS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "alembic"

_CURRENT = select(table("alembic_version", column("version_num", String)).c.version_num)


_DATABASE = text("SELECT getdatabaseencoding() = 'UTF8', current_schema() IS NOT NULL")


@reads
def current(session: Session) -> set[str]:
    """Return the revisions of the database: one, or none before the first migration."""
    return set(session.exec(_CURRENT))


def check_database(connection: Connection) -> None:
    """Raise `WrongDatabase` if PostgreSQL's encoding or the role's privileges do not fit."""
    if connection.dialect.name != "postgresql":
        return
    # Computed by the server: psycopg returns texts of an SQL_ASCII database as bytes.
    is_utf8, has_schema = connection.execute(_DATABASE).one()
    if not is_utf8:
        raise WrongDatabase(
            "The database cannot be used: its encoding is not UTF8: create it with ENCODING 'UTF8'"
        )
    if not has_schema:
        raise WrongDatabase(
            "The database cannot be used: the role has no USAGE on a schema of its search_path"
        )


@reads
def check_writable(session: Session) -> None:
    """Raise `WrongDatabase` if PostgreSQL is a standby or its sessions are read-only."""
    if session.get_bind().dialect.name != "postgresql":
        return
    # The setting is also on during recovery.
    if session.connection().scalar(text("SHOW transaction_read_only")) == "on":
        session.connection().invalidate()  # A new connection may lead to the new primary.
        raise WrongDatabase("The database cannot be used: it is read-only")


class Revisions(NamedTuple):
    """The newest revision that the code knows, and all revisions that it knows."""

    head: str
    known: frozenset[str]

    @classmethod
    def of_the_code(cls) -> Self:
        """Read the migration scripts. Raises alembic's `CommandError` if they are broken."""
        scripts = ScriptDirectory(str(SCRIPTS))
        known = frozenset(script.revision for script in scripts.walk_revisions())
        return cls(scripts.get_current_head() or "base", known)

    @reads
    def check(self, session: Session) -> None:
        """Return if this code works with the database, else raise `WrongDatabase`, `SchemaBehind`.

        An unknown revision belongs to a newer release. Its schema serves the previous release too.
        """
        check_database(session.connection())
        found = current(session)
        if self.head in found or found - self.known:
            return
        raise SchemaBehind(f"it is at {', '.join(found) or 'no revision'}, the code at {self.head}")

    @reads
    def check_ready(self, session: Session) -> None:
        """Return if this code works with the database and can write, else raise as above."""
        self.check(session)
        check_writable(session)

"""What can go wrong, one small class each; `app.api.problems` says how each is answered."""

from typing import NamedTuple


class HeroNotFound(Exception):
    """There is no hero with this id."""


class HeroChanged(Exception):
    """The hero is not at the version that the client knows."""


class KeyReused(Exception):
    """The idempotency key was used with another body."""


class LineError(NamedTuple):
    """What is wrong in an import: in this line, counted from 1, and in this member of it if any."""

    line: int
    field: str | None
    type: str
    message: str


class ImportRefused(Exception):
    """Lines of an import are wrong: `errors` has the first of them."""

    def __init__(self, errors: list[LineError]) -> None:
        super().__init__(errors)
        self.errors = errors


class ImportTooLong(Exception):
    """An import has more bytes than is taken, after it was decompressed."""


class NotAuthenticated(Exception):
    """A write came without a token, or with one that is not among `API_TOKENS`."""


class NotAuthorized(Exception):
    """A write came with a valid token whose scope does not allow it."""


class Draining(Exception):
    """This worker takes no new connections: it answers what it has and stops."""


class DatabaseTimeout(Exception):
    """A unit of work took longer than `DATABASE_TIMEOUT`."""


class SchemaBehind(Exception):
    """The database's schema is older than the code: its migrations have not been run."""

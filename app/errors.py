"""One small exception class per failure. `app.api.exception_handlers` maps each to a response."""

from typing import NamedTuple


class NotFound(Exception):
    """There is no row with this id. The message is for the client."""


class Changed(Exception):
    """The row exists but does not match `If-Match`. The message is for the client."""


class KeyReused(Exception):
    """The idempotency key was used before with another body."""


class LineError(NamedTuple):
    """One error in an import: its line, counted from 1, and its field if it concerns one."""

    line: int
    field: str | None
    type: str
    message: str


class ImportRefused(Exception):
    """The import has wrong lines. `errors` lists at most `MAX_ERRORS`, in order."""

    def __init__(self, errors: list[LineError]) -> None:
        super().__init__(errors)
        self.errors = errors


class ImportTooLarge(Exception):
    """The import has more bytes than allowed, counted after decompression."""


class TooManySpools(Exception):
    """This worker stores as many imports and exports in temporary files as it may."""


class StorageFull(Exception):
    """There is no space for a temporary file."""


class NotAuthenticated(Exception):
    """The request has no token, or an unknown one."""


class NotAuthorized(Exception):
    """The token is valid, but its scope does not allow the request."""


class Draining(Exception):
    """This worker accepts no new connections. It completes its open requests and stops."""


class DatabaseTimeout(Exception):
    """A database call took longer than its timeout, and wrote nothing."""


class DatabaseUnavailable(Exception):
    """No connection to the database can be made. The message is the reason, for the log."""


class OutcomeUnknown(Exception):
    """The database did not confirm a write that was sent. It may have happened."""


class Overloaded(Exception):
    """More calls wait for a connection than can be served in time."""


class SchemaBehind(Exception):
    """The database's schema is older than the code: migrations have not been run."""


class WrongDatabase(Exception):
    """The database has a property that the service cannot work with. The message names it."""

"""What can go wrong, one small class each; `app.api.problems` says how each is answered."""


class HeroNotFound(Exception):
    """There is no hero with this id."""


class HeroChanged(Exception):
    """The hero is not at the version that the client knows."""


class KeyReused(Exception):
    """The idempotency key was used with another body."""


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

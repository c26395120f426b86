"""The FastAPI SQL tutorial, carried to production."""

# The name of the service in logs, metrics, commands and database sessions.
NAME = "heroes"
__version__ = "0.1.0"

"""The FastAPI SQL tutorial, carried to production."""

# The name of the service in logs, metrics, commands and database sessions.
NAME = "heroes"
# The advisory lock of the migrations. Any number that no other application on the database uses.
MIGRATION_LOCK = 7_452_308_671
__version__ = "0.1.0"

"""The FastAPI SQL tutorial, carried to production."""

__version__ = "0.1.0"

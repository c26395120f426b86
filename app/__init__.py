"""The FastAPI SQL tutorial, carried to production."""

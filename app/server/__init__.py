"""The production server: uvicorn under gunicorn."""

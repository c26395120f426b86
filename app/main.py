"""The entry point: `app.main:app`."""

from app.application import create_app
from app.settings import from_environment
from app.telemetry import logs

settings = from_environment()
logs.configure(settings.log_level, settings.log_format)
app = create_app(settings)

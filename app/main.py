"""The entry point: `app.main:app`."""

from app.application import create_app
from app.settings import from_environment, log_start
from app.telemetry import logs

settings = from_environment()
logs.configure(settings.log_level, settings.log_format)
log_start(settings.database_url)
app = create_app(settings)

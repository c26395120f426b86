"""The service without access log, metrics and request ids, to measure their cost."""

from typing import cast

from app.api.middleware import Observe
from app.main import app

app.user_middleware = [
    each for each in app.user_middleware if each.cls is not cast("object", Observe)
]

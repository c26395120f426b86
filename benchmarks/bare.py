"""The service without access log, metrics and request ids, to see what those cost."""

from typing import cast

from app.api.middleware import Observe
from app.main import app

app.user_middleware = [
    each for each in app.user_middleware if each.cls is not cast("object", Observe)
]

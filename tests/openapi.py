"""Print the OpenAPI document of the service with its default settings: see `make openapi`."""

import json

from app.application import create_app
from app.settings import Settings


def document() -> str:
    """Return the document of a service without tokens, whatever the environment contains."""
    app = create_app(Settings.model_construct())
    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(document(), end="")  # noqa: T201

"""Projects of Docker Compose for the tests, and the commands that the docs give for them."""

import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx2
import pytest

from tests.postgres import docker_answers
from tests.service import ROOT, free_port, http_client

has_compose = bool(shutil.which("docker") and docker_answers())
needs_compose = pytest.mark.skipif(not has_compose, reason="needs a Docker Engine with Compose")


class Stack:
    """One compose project of this run's own, on a port of its own."""

    def __init__(self, folder: Path, *overlays: str) -> None:
        self.port = free_port()
        self.folder = folder
        self.env = os.environ | {
            "COMPOSE_PROJECT_NAME": f"heroes-test-{uuid.uuid4().hex[:8]}",
            "COMPOSE_FILE": ":".join(str(ROOT / f) for f in ("docker-compose.yml", *overlays)),
            "PORT": str(self.port),
            # Characters that a URL or a shell would mind.
            "OWNER_PASSWORD": "o'w%n:e@r/ $x",
            "APP_PASSWORD": 'a"p%p:@/ \\x',
        }

    def dotenv(self, content: str) -> None:
        """Replace `.env`. Its lines apply where the environment does not have the variable."""
        file = self.folder / "env"
        file.write_text(content)
        self.env["COMPOSE_ENV_FILES"] = str(file)
        for name in ("POSTGRES_PASSWORD", "OWNER_PASSWORD", "APP_PASSWORD"):
            self.env.pop(name, None)

    def run(self, command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=self.env,
            check=check,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def sql(self, statement: str, role: str = "postgres", database: str = "heroes") -> str:
        """Return the output of psql, or its error."""
        done = subprocess.run(
            [
                *("docker", "compose", "exec", "-T", "--env", "PGPASSWORD", "db", "psql"),
                *("--no-psqlrc", "--tuples-only", "--no-align", "--username", role),
                *(("--host", "127.0.0.1") if role != "postgres" else ()),
                *("--dbname", database, "--command", statement),
            ],
            env=self.env | {"PGPASSWORD": self.env["APP_PASSWORD"]},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.strip() or done.stderr.strip()

    def config(self) -> dict[str, Any]:
        """The services, as Compose reads them."""
        config = json.loads(self.run("docker compose config --format json").stdout)
        return dict(config["services"])

    def container(self, service: str) -> str:
        return self.run(f"docker compose ps --all --quiet {service}").stdout.strip()

    def inspect(self, service: str, template: str) -> str:
        command = f"docker inspect --format '{template}' {self.container(service)}"
        return self.run(command).stdout.strip()

    def address(self, service: str) -> str:
        """The address of the service's container, which this machine can reach."""
        [network] = json.loads(self.inspect(service, "{{json .NetworkSettings.Networks}}")).values()
        return str(network["IPAddress"])

    @contextmanager
    def started(self) -> Iterator[Self]:
        """Build and run the project during the block."""
        up = self.run("docker compose up -d --build --wait", check=False)
        try:
            logs = self.run("docker compose ps -a; docker compose logs --tail 30", check=False)
            assert up.returncode == 0, up.stderr + logs.stdout
            yield self
        finally:
            self.down()

    def down(self) -> None:
        self.run("docker compose down --volumes --timeout 5", check=False)

    def client(self) -> httpx2.Client:
        return http_client(self.port)


def commands_in(section: str) -> list[str]:
    """The commands that docs/operations.md marks as run by a test."""
    operations = (ROOT / "docs" / "operations.md").read_text().split(section)[1]
    block = re.search(r"<!-- tests/test_compose.*?```console\n(.*?)```", operations, re.DOTALL)
    assert block
    return re.findall(r"^\$ (.*)$", block[1], re.MULTILINE)

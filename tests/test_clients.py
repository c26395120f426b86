"""Clients that are generated from docs/openapi.json: their types, and their use of the service.

The generators are no dependencies of the project. The tests install them from the hashed locks in
tests/clients/ into folders of their own, which takes seconds if the packages are cached.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.service import BIN, ROOT, Service

CLIENTS = ROOT / "tests" / "clients"
DOCUMENT = ROOT / "docs" / "openapi.json"
OFFLINE = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONN|ETIMEDOUT|[Ff]ailed to fetch|dns error")


@pytest.fixture
def backend() -> str:
    return "sqlite"


def run(*command: str | Path, folder: Path, check: bool = True) -> str:
    """Return the output of the command, with the programs of the tests' environment on PATH."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    if done.returncode and OFFLINE.search(done.stdout):
        pytest.skip(f"needs a package registry that {command[0]} can reach")
    assert done.returncode == 0 or not check, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of tests/clients/package-lock.json."""
    if not shutil.which("npm"):
        pytest.skip("needs Node.js with npm")
    folder = tmp_path_factory.mktemp("npm")
    for name in ("package.json", "package-lock.json", "client.ts"):
        shutil.copy(CLIENTS / name, folder)
    run("npm", "ci", "--prefer-offline", "--ignore-scripts", "--no-audit", folder=folder)
    return folder


def test_a_python_client_is_generated_and_works(service: Service, tmp_path: Path) -> None:
    shutil.copy(CLIENTS / "client.py", tmp_path)
    environment = tmp_path / "environment"
    python = environment / "bin" / "python"
    run("uv", "venv", "--quiet", environment, folder=tmp_path)
    requirements = ("--require-hashes", "--requirement", CLIENTS / "requirements.txt")
    run("uv", "pip", "install", "--quiet", "--python", python, *requirements, folder=tmp_path)
    generated = run(
        *(environment / "bin" / "openapi-python-client", "generate", "--path", DOCUMENT),
        *("--output-path", "heroes_client", "--meta", "none"),
        folder=tmp_path,
    )
    # The generator supports no body that is text.
    assert re.findall(r"WARNING parsing (.*) within", generated) == ["POST /heroes/import"]
    (tmp_path / "mypy.ini").write_text(
        # The same for every document, and with an error of the generator.
        "[mypy]\nstrict = true\n[mypy-heroes_client.client]\nignore_errors = true\n"
    )
    run("mypy", "--python-executable", python, "client.py", "heroes_client", folder=tmp_path)
    run(python, "client.py", f"http://127.0.0.1:{service.port}", folder=tmp_path)
    # The control: the types refuse a member that the service does not have.
    wrong = (tmp_path / "client.py").read_text().replace("age=48", "power=48")
    (tmp_path / "client.py").write_text(wrong)
    errors = run("mypy", "--python-executable", python, "client.py", folder=tmp_path, check=False)
    assert 'Unexpected keyword argument "power" for "HeroUpdate"' in errors


def test_a_typescript_client_is_generated_and_works(service: Service, npm: Path) -> None:
    programs = npm / "node_modules" / ".bin"
    run(programs / "openapi-typescript", DOCUMENT, "--output", "heroes.ts", folder=npm)
    options = ("--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext")
    # client.ts contains a request that the types must refuse.
    run(programs / "tsc", *options, "client.ts", folder=npm)
    run("node", "client.js", f"http://127.0.0.1:{service.port}", folder=npm)


def test_the_document_follows_spectrals_rules_except_for_the_tutorials_path(npm: Path) -> None:
    (npm / ".spectral.yaml").write_text('extends: ["spectral:oas"]\n')
    linted = run(
        *(npm / "node_modules" / ".bin" / "spectral", "lint", "--quiet", "--format", "json"),
        DOCUMENT,
        folder=npm,
    )
    found = [(each["code"], *each["path"]) for each in json.loads(linted)]
    assert found == [("path-keys-no-trailing-slash", "paths", "/heroes/")]

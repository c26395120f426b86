"""The containers' files, checked without Docker."""

import os
import subprocess
from pathlib import Path

import pytest

from app.limits import default_workers, usable_cores, usable_memory
from tests.service import ROOT

MIB = 1024**2
CORES = 16
MEMORY = 64 * 1024 * MIB


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 16 cores and 64 GiB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": MEMORY // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)


def cgroups(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def v2(memory: str = "max", cpu: str = "max 100000") -> dict[str, str]:
    return {"memory.max": memory, "cpu.max": cpu}


def v1(memory: str = "9223372036854771712", quota: str = "-1") -> dict[str, str]:
    return {
        "memory/memory.limit_in_bytes": memory,
        "cpu/cpu.cfs_quota_us": quota,
        "cpu/cpu.cfs_period_us": "100000",
    }


LIMITS = {
    "no files": ({}, CORES, MEMORY),
    "v2 without limits": (v2(), CORES, MEMORY),
    "v1 without limits": (v1(), CORES, MEMORY),
    "v2 memory": (v2(memory=f"{1024 * MIB}"), CORES, 1024 * MIB),
    "v1 memory": (v1(memory=f"{1024 * MIB}"), CORES, 1024 * MIB),
    "v2 cores": (v2(cpu="450000 100000"), 4, MEMORY),
    "v1 cores": (v1(quota="450000"), 4, MEMORY),
    "v2 half a core": (v2(cpu="50000 100000"), 1, MEMORY),
    "v1 half a core": (v1(quota="50000"), 1, MEMORY),
    "more than the machine has": (v2(f"{2 * MEMORY}", "9900000 100000"), CORES, MEMORY),
    "content that is no number": (v2("?", ""), CORES, MEMORY),
}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("files", "cores", "memory"), LIMITS.values(), ids=LIMITS)
def test_a_containers_limits_are_respected(
    files: dict[str, str], cores: int, memory: int, tmp_path: Path
) -> None:
    root = cgroups(tmp_path, files)
    assert (usable_cores(root), usable_memory(root)) == (cores, memory)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("memory", "workers"),
    [(64, 1), (256, 1), (383, 1), (384, 2), (1024, 7), (4096, CORES)],
)
def test_the_default_number_of_workers_fits_the_memory(
    memory: int, workers: int, tmp_path: Path
) -> None:
    """128 MiB per worker, and 128 MiB for the rest."""
    assert default_workers(cgroups(tmp_path, v2(memory=f"{memory * MIB}"))) == workers


@pytest.mark.usefixtures("machine")
def test_a_small_machine_without_a_container_has_fewer_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 512 * MIB // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert default_workers(tmp_path) == 3


def test_a_checkout_on_windows_has_no_carriage_returns(tmp_path: Path) -> None:
    """Bash in a container does not run a script with CRLF line ends."""

    # In a hook, git's variables name this repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], env=env, check=True, capture_output=True, timeout=60)

    # A repository of its own, so that the files need not be committed.
    source, clone = tmp_path / "source", tmp_path / "clone"
    git("init", "--quiet", str(source))
    ours = (f"--git-dir={source / '.git'}", f"--work-tree={ROOT}")
    git(*ours, "add", "--all")
    git(*ours, "-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "--message=x")
    git("clone", "--quiet", "--config", "core.autocrlf=true", str(source), str(clone))

    files = [each for each in clone.rglob("*") if each.is_file() and ".git" not in each.parts]
    assert clone / "docker" / "roles.sh" in files
    contents = {each.relative_to(clone): each.read_bytes() for each in files}
    # A file with NUL is binary, as for git.
    changed = [
        each for each, content in contents.items() if b"\r\n" in content and b"\0" not in content
    ]
    assert [str(each) for each in changed] == []


@pytest.mark.parametrize("variable", ["POSTGRES_PASSWORD", "OWNER_PASSWORD", "APP_PASSWORD"])
@pytest.mark.parametrize("value", [None, "", "  "], ids=["unset", "empty", "spaces"])
def test_the_roles_get_no_empty_password(variable: str, value: str | None) -> None:
    passwords = {"POSTGRES_PASSWORD": "p", "OWNER_PASSWORD": "o", "APP_PASSWORD": "a"}
    given = passwords | {variable: value}
    refused = subprocess.run(
        ["bash", ROOT / "docker" / "roles.sh"],
        env={"PATH": os.environ["PATH"], **{k: v for k, v in given.items() if v is not None}},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"{variable} is empty; ")
    assert refused.stderr.count("\n") == 1

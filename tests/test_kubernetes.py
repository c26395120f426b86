"""The manifests in deploy/kubernetes/: valid, consistent with the code, and run by Docker."""

import copy
import itertools
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import kubernetes_validate
import pytest
import yaml
from sqlalchemy import make_url

from app import NAME, __version__
from app.api.middleware import MAX_IMPORT_BYTES
from app.limits import BYTES_FOR_THE_REST, BYTES_PER_WORKER
from app.settings import Settings
from tests.postgres import POSTGRES_IMAGE, docker_answers
from tests.service import BIN, ROOT, http_client, serve, settings

FOLDER = ROOT / "deploy" / "kubernetes"
DOCS = (ROOT / "docs" / "kubernetes.md").read_text()
VERSIONS = ("1.35", "1.36", "1.37")
Manifest = dict[str, Any]

KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS: list[Manifest] = [
    manifest
    for file in KUSTOMIZATION["resources"]
    for manifest in yaml.safe_load_all((FOLDER / file).read_text())
]
SECRETS: dict[str, Manifest] = {
    secret["metadata"]["name"]: secret
    for secret in yaml.safe_load_all((FOLDER / "secret.example.yaml").read_text())
}
BY_KIND = {manifest["kind"]: manifest for manifest in MANIFESTS}
DEPLOYMENT = BY_KIND["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
[API] = POD["containers"]
MIGRATION_POD = BY_KIND["Job"]["spec"]["template"]["spec"]
[MIGRATION] = MIGRATION_POD["containers"]
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
UNITS = {"Mi": 1024**2, "Gi": 1024**3}


def in_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def variables(container: Manifest) -> dict[str, str]:
    """Return the environment of the container, with the values of the example Secrets."""
    variables = {each["name"]: each["value"] for each in container["env"]}
    for source in container["envFrom"]:
        variables |= SECRETS[source["secretRef"]["name"]]["stringData"]
    return variables


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", [*MANIFESTS, *SECRETS.values()], ids=lambda each: each["kind"])
def test_a_manifest_is_valid(manifest: Manifest, version: str) -> None:
    assert kubernetes_validate.validate(manifest, version, strict=True) == version
    # The control: an unknown member is refused.
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest | {"specification": {}}, version, strict=True)


def test_the_page_names_the_versions() -> None:
    assert f"{VERSIONS[0]} to {VERSIONS[-1]}" in DOCS


def test_the_kustomization_has_every_manifest_but_the_example() -> None:
    files = {file.name for file in FOLDER.iterdir()}
    examples = {"kustomization.yaml", "secret.example.yaml"}
    assert files - examples == set(KUSTOMIZATION["resources"])


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
def test_kubectl_renders_the_release_of_the_code() -> None:
    rendered = subprocess.run(
        ["kubectl", "kustomize", FOLDER], capture_output=True, text=True, check=True, timeout=60
    )
    found = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(rendered.stdout)}
    expected = copy.deepcopy(BY_KIND)
    for kind in ("Deployment", "Job"):
        [container] = expected[kind]["spec"]["template"]["spec"]["containers"]
        container["image"] = f"{NAME}:{__version__}"
    assert found == expected


def test_every_variable_is_a_setting_with_an_accepted_value() -> None:
    for container in (API, MIGRATION):
        given = variables(container)
        assert given.keys() - {"FORWARDED_ALLOW_IPS"} <= {
            field.upper() for field in Settings.model_fields
        }
        given.pop("API_TOKENS", None)  # The example has no valid token.
        values: dict[str, Any] = {name.lower(): value for name, value in given.items()}
        Settings(_env_file=None, **values)


def test_the_service_has_no_access_to_the_role_that_owns_the_schema() -> None:
    roles = {
        name: {make_url(url).username for key, url in secret["stringData"].items() if "URL" in key}
        for name, secret in SECRETS.items()
    }
    assert roles == {"heroes-api": {"heroes_app"}, "heroes-migration": {"heroes_owner"}}
    assert [each["secretRef"]["name"] for each in API["envFrom"]] == ["heroes-api"]
    assert [each["secretRef"]["name"] for each in MIGRATION["envFrom"]] == ["heroes-migration"]


def test_the_selectors_select_the_pods() -> None:
    labels = DEPLOYMENT["template"]["metadata"]["labels"]
    assert DEPLOYMENT["selector"]["matchLabels"] == labels
    assert BY_KIND["Service"]["spec"]["selector"] == labels
    assert BY_KIND["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    [spread] = POD["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    migration = BY_KIND["Job"]["spec"]["template"]["metadata"]["labels"]
    assert migration.items() & labels.items() == {("app.kubernetes.io/name", NAME)}
    both = BY_KIND["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert both.items() == migration.items() & labels.items()
    target = BY_KIND["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == BY_KIND["Deployment"]["metadata"]["name"]


def test_the_ports_are_those_of_the_image() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    [port] = API["ports"]
    assert f"EXPOSE {port['containerPort']}\n" in dockerfile
    assert f"PORT={port['containerPort']}\n" in dockerfile
    [service] = BY_KIND["Service"]["spec"]["ports"]
    [rule] = BY_KIND["NetworkPolicy"]["spec"]["ingress"]
    named = [API[probe]["httpGet"]["port"] for probe in PROBES]
    assert {service["targetPort"], rule["ports"][0]["port"], *named} == {port["name"]}
    annotations = DEPLOYMENT["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    *_, database = BY_KIND["NetworkPolicy"]["spec"]["egress"]
    urls = variables(API)["DATABASE_URL"], variables(MIGRATION)["MIGRATION_DATABASE_URL"]
    assert [each["port"] for each in database["ports"]] == [*{make_url(url).port for url in urls}]


def test_the_paths_exist(tmp_path: Path) -> None:
    annotations = DEPLOYMENT["template"]["metadata"]["annotations"]
    paths = {API[probe]["httpGet"]["path"] for probe in PROBES}
    configured = settings(make_url(f"sqlite:///{tmp_path}/heroes.db"))
    with serve(configured) as service, service.client() as client:
        for path in (*paths, annotations["prometheus.io/path"]):
            assert client.get(path).status_code != 404, path
        assert client.get("/health/alive").status_code == 404  # The control.


@pytest.mark.parametrize("pod", [POD, MIGRATION_POD], ids=["api", "migration"])
def test_the_containers_can_do_no_more_than_they_must(pod: Manifest) -> None:
    [container] = pod["containers"]
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert f"USER {user}\n" in (ROOT / "Dockerfile").read_text()
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert not pod["automountServiceAccountToken"]


def test_the_times_and_sizes_fit_those_of_the_code() -> None:
    shown = subprocess.run(
        [BIN / "gunicorn", "--check-config", "--print-config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    gunicorn = dict(re.findall(r"^(\w+) += (.*)$", shown.stdout, re.MULTILINE))
    given = variables(API)

    sleep = API["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] > sleep + int(gunicorn["graceful_timeout"])
    timeout = Settings.model_fields["database_timeout"].default
    assert API["readinessProbe"]["timeoutSeconds"] > timeout

    mounts = {each["mountPath"]: each["name"] for each in API["volumeMounts"]}
    volumes = {each["name"]: each["emptyDir"] for each in POD["volumes"]}
    assert volumes[mounts[gunicorn["worker_tmp_dir"]]]["medium"] == "Memory"
    assert in_bytes(volumes[mounts["/tmp"]]["sizeLimit"]) > MAX_IMPORT_BYTES

    limits = API["resources"]["limits"]
    workers = int(given["WEB_CONCURRENCY"])
    assert workers == 1
    assert in_bytes(limits["memory"]) >= workers * BYTES_PER_WORKER + BYTES_FOR_THE_REST
    assert in_bytes(limits["ephemeral-storage"]) > in_bytes(volumes[mounts["/tmp"]]["sizeLimit"])

    # In a release each pod may have a successor while it drains. PostgreSQL's max_connections is
    # 100 by default, 3 of them for superusers.
    pods = BY_KIND["HorizontalPodAutoscaler"]["spec"]["maxReplicas"]
    assert 2 * pods * int(given["DATABASE_POOL_SIZE"]) <= 97


def docker(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 or not check, done.stderr + done.stdout
    return done


class Pod:
    """Containers of one network, run by Docker with the restrictions of the manifests.

    The database listens on 127.0.0.1 in this network.
    """

    def __init__(self, image: str) -> None:
        self.image = image
        self.id = f"heroes-test-{uuid.uuid4().hex[:8]}"
        self._names = itertools.count()

    def start_database(self) -> None:
        """Start PostgreSQL, with the roles of docker/roles.sh."""
        password = ("--env", "POSTGRES_PASSWORD=x", "--env", "POSTGRES_DB=heroes")
        published = ("--publish", f"127.0.0.1::{API['ports'][0]['containerPort']}")
        docker("run", "--detach", "--name", self.id, *password, *published, POSTGRES_IMAGE)
        ready = ("exec", self.id, "pg_isready", "--host=127.0.0.1", "--dbname=heroes")
        deadline = time.monotonic() + 60
        while docker(*ready, check=False).returncode:
            assert time.monotonic() < deadline, docker("logs", self.id).stderr
            time.sleep(0.1)
        docker("cp", ROOT / "docker" / "roles.sh", f"{self.id}:/roles.sh")
        passwords = ("OWNER_PASSWORD=x", "APP_PASSWORD=x", "POSTGRES_PASSWORD=x")
        env = itertools.chain.from_iterable(("--env", each) for each in passwords)
        docker("exec", *env, self.id, "bash", "/roles.sh")

    @property
    def port(self) -> int:
        """The published port of the service."""
        return int(docker("port", self.id, "8000").stdout.splitlines()[0].rpartition(":")[2])

    def run(self, pod: Manifest, *arguments: str) -> str:
        """Run the container of this pod, and return its name."""
        [container] = pod["containers"]
        context, own = pod["securityContext"], container["securityContext"]
        assert own["readOnlyRootFilesystem"]
        assert not own["allowPrivilegeEscalation"]
        flags = ["--read-only", "--security-opt", "no-new-privileges:true"]
        flags += ["--user", f"{context['runAsUser']}:{context['runAsGroup']}"]
        for capability in own["capabilities"]["drop"]:
            flags += ["--cap-drop", capability]
        volumes = {each["name"]: each["emptyDir"] for each in pod["volumes"]}
        for mount in container["volumeMounts"]:
            volume = volumes[mount["name"]]
            size = in_bytes(volume["sizeLimit"])
            flags += (
                ["--tmpfs", f"{mount['mountPath']}:mode=1777,size={size}"]
                if volume.get("medium") == "Memory"
                else ["--volume", mount["mountPath"]]
            )
        flags += ["--memory", str(in_bytes(container["resources"]["limits"]["memory"]))]
        given = variables(container)
        given.pop("API_TOKENS", None)
        for name, value in given.items():
            value = value.replace("PASSWORD@HOST", "x@127.0.0.1").replace("?sslmode=require", "")
            flags += ["--env", f"{name}={value}"]
        name = f"{self.id}-{next(self._names)}"
        command = container.get("command", [])
        network = ("--network", f"container:{self.id}", "--name", name)
        docker("run", *network, *flags, *arguments, self.image, *command)
        return name

    def remove(self) -> None:
        named = docker("ps", "--all", "--quiet", "--filter", f"name=^{self.id}").stdout.split()
        docker("rm", "--force", "--volumes", *named, check=False)


@pytest.fixture
def pod() -> Iterator[Pod]:
    pod = Pod(docker("build", "--quiet", ROOT).stdout.strip())
    try:
        pod.start_database()
        yield pod
    finally:
        pod.remove()


@pytest.mark.skipif(not docker_answers(), reason="needs a Docker Engine")
def test_the_image_runs_with_the_restrictions_of_the_manifests(
    pod: Pod, figures: list[str]
) -> None:
    pod.run(MIGRATION_POD)
    name = pod.run(POD, "--detach")
    with http_client(pod.port, timeout=60) as client:

        def status(probe: str) -> int:
            try:
                get = API[probe]["httpGet"]
                timeout = API[probe]["timeoutSeconds"]
                return client.get(get["path"], timeout=timeout).status_code
            except httpx2.TransportError:
                return 0

        started = API["startupProbe"]
        for _ in range(started["failureThreshold"]):
            if status("startupProbe") == 200:
                break
            time.sleep(started["periodSeconds"])
        assert [status(probe) for probe in PROBES] == [200] * 3, docker("logs", name).stderr

        def memory() -> str:
            used = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", name).stdout
            return used.partition(" /")[0]

        idle = memory()
        line = b'{"name": "Deadpond", "secret_name": "Dive Wilson"}\n'
        body = line * (20 * 1024**2 // len(line))
        headers = {"Content-Type": "application/x-ndjson"}
        imported = client.post("/heroes/import", content=body, headers=headers)
        assert imported.status_code == 200, imported.text
        assert client.get("/heroes/?total=true").headers["X-Total-Count"] == str(
            imported.json()["created"]
        )
        assert "http_server_request_duration_seconds" in client.get("/metrics").text
        figures.append(
            f"one worker in a pod: {idle} after the start, {memory()} after an import of 20 MiB"
        )

        written = docker("exec", name, "touch", "/srv/heroes/x", check=False)
        assert "Read-only file system" in written.stderr
        # As the kubelet does, while this client has an idle connection.
        sleep = API["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace = POD["terminationGracePeriodSeconds"] - sleep
        docker("stop", "--time", str(grace), name)
    ended = docker("inspect", "--format", "{{.State.ExitCode}} {{.State.OOMKilled}}", name)
    assert ended.stdout == "0 false\n"

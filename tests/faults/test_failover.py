"""Failover of a real cluster under load: deploy/patroni/compose.yml. `make faults` runs this.

Clients write through both forms of the service, several hosts and HAProxy. Some of them write with
idempotency keys and send each failed write again. Afterwards each acknowledged write must be in the
database, once. The faults happen at two round trips between the service and the database.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2
import psycopg
import pytest

from tests.compose import Stack, has_compose
from tests.service import ROOT, free_port, http_client

pytestmark = pytest.mark.skipif(
    not (
        os.environ.get("FAULTS")
        and has_compose
        and shutil.which("nsenter")
        and shutil.which("iptables")
    ),
    reason="takes minutes: run `make faults` as root, with Docker, nsenter and iptables",
)

NODES = ("db1", "db2", "db3")
STORES = ("etcd1", "etcd2", "etcd3")
# Per form of the service. At a round trip of 200 ms a write takes 0.2 s, and one with a key 1.2 s.
CLIENTS = 24
CLIENTS_WITH_KEYS = 4
WRITES_PER_SECOND = 65
DATABASE_TIMEOUT = 5
RUNS = int(os.environ.get("FAULTS") or 1)  # Per fault.


class Write(NamedTuple):
    """One request: times, the status or 0 without a response, and the name of its hero."""

    start: float
    end: float
    status: int
    name: str
    has_key: bool


class Cluster(Stack):
    """The compose project with the cluster."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "deploy/patroni/compose.yml")
        haproxy_port = free_port()
        self.env["HAPROXY_PORT"] = str(haproxy_port)
        self.synchronous = True
        self.forms = {"several hosts": self.port, "HAProxy": haproxy_port}

    def connect(self, address: str) -> psycopg.Connection:
        return psycopg.connect(
            host=address,
            user="postgres",
            password="postgres",
            dbname="heroes",
            autocommit=True,
            connect_timeout=2,
            tcp_user_timeout=2000,
        )

    def primary(self) -> str:
        """The primary if both standbys stream from it, else an empty string."""
        command = "patronictl --config-file /etc/patroni/heroes.yml list --format json"
        expected = ["Leader", "Replica", "Sync Standby" if self.synchronous else "Replica"]
        for node in NODES:
            listed = self.run(f"docker compose exec -T {node} {command}", check=False)
            if listed.returncode == 0:
                members = json.loads(listed.stdout)
                by_role = {each["Role"]: each["Member"] for each in members}
                states = {each["State"] for each in members}
                roles = sorted(each["Role"] for each in members)
                if roles == expected and states == {"running", "streaming"}:
                    return str(by_role["Leader"])
        return ""

    def settled(self) -> str:
        """Wait until there are a primary and two standbys. Return the primary."""
        deadline = time.monotonic() + 120
        while not (primary := self.primary()):
            assert time.monotonic() < deadline, self.run("docker compose ps -a").stdout
            time.sleep(1)
        return primary

    def errors(self) -> str:
        """Return the service's log of errors, with their tracebacks."""
        logs = self.run("docker compose logs --no-log-prefix api api-haproxy").stdout
        return "\n".join(line for line in logs.splitlines() if '"level": "ERROR"' in line)

    @contextmanager
    def round_trip(self, seconds: float) -> Iterator[None]:
        """Delay the packets between the service and the database during the block."""
        delays = []
        try:
            for service in ("api", "api-haproxy") if seconds else ():
                enter = ["nsenter", "--net", "--target", self.inspect(service, "{{.State.Pid}}")]
                delay = [sys.executable, "-m", "tests.faults.delay", "5432", str(seconds)]
                process = subprocess.Popen([*enter, *delay], cwd=ROOT, stdout=subprocess.PIPE)
                delays.append(process)
                assert process.stdout
                assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            for process in delays:
                process.terminate()
                process.communicate(timeout=10)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("failover")).started() as cluster:
        yield cluster


@contextmanager
def writing(port: int) -> Iterator[list[Write]]:
    """Create heroes during the block. A write with a key is repeated until it has a 200."""
    writes: list[Write] = []
    stop = threading.Event()

    def write(has_key: bool) -> None:
        with http_client(port) as client:
            name = uuid.uuid4().hex
            while not stop.is_set():
                headers = {"Idempotency-Key": name} if has_key else {}
                body = {"name": name, "secret_name": "s"}
                start = time.monotonic()
                try:
                    status = client.post("/heroes/", json=body, headers=headers).status_code
                except httpx2.TransportError:
                    status = 0
                end = time.monotonic()
                writes.append(Write(start, end, status, name, has_key))
                if status == 200 or not has_key:
                    name = uuid.uuid4().hex
                time.sleep(max(0.05, CLIENTS / WRITES_PER_SECOND - (end - start)))

    threads = [
        threading.Thread(target=write, args=(number < CLIENTS_WITH_KEYS,))
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    try:
        yield writes
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def election(cluster: Cluster, old: str) -> Iterator[list[float]]:
    """Yield a list that gets the time at which another node than `old` accepts writes."""
    elected: list[float] = []
    stop = threading.Event()

    def watch(address: str) -> None:
        while not (stop.is_set() or elected):
            try:
                with cluster.connect(address) as connection:
                    while not (stop.is_set() or elected):
                        in_recovery = connection.execute("SELECT pg_is_in_recovery()").fetchone()
                        if in_recovery == (False,):
                            elected.append(time.monotonic())
                        time.sleep(0.05)
            except psycopg.Error:
                time.sleep(0.05)

    others = [cluster.address(node) for node in NODES if node != old]
    threads = [threading.Thread(target=watch, args=(address,)) for address in others]
    for thread in threads:
        thread.start()
    try:
        yield elected
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def kill(cluster: Cluster, primary: str) -> Callable[[], object]:
    cluster.run(f"docker kill {cluster.container(primary)}")
    return lambda: cluster.run(f"docker start {cluster.container(primary)}")


def switch_over(cluster: Cluster, primary: str) -> Callable[[], object]:
    command = "patronictl --config-file /etc/patroni/heroes.yml switchover --force heroes"
    cluster.run(f"docker compose exec -T {primary} {command} --leader {primary}")
    return lambda: None


def partition(cluster: Cluster, primary: str) -> Callable[[], object]:
    """Drop all packets of the primary, so that no socket is closed."""
    return drop_packets(cluster, primary, ["! -i lo"], ["! -o lo"])


def partition_from_the_cluster(cluster: Cluster, primary: str) -> Callable[[], object]:
    """Drop the packets between the primary and the cluster. The service still reaches it."""
    others = [cluster.address(each) for each in (*NODES, *STORES) if each != primary]
    sources = [f"-s {address}" for address in others]
    return drop_packets(cluster, primary, sources, [f"-d {address}" for address in others])


def drop_packets(
    cluster: Cluster, service: str, incoming: list[str], outgoing: list[str]
) -> Callable[[], object]:
    pid = cluster.inspect(service, "{{.State.Pid}}")
    iptables = f"nsenter --net --target {pid} iptables"
    rules = [f"INPUT {rule}" for rule in incoming] + [f"OUTPUT {rule}" for rule in outgoing]
    cluster.run(" && ".join(f"{iptables} -A {rule} -j DROP" for rule in rules))
    # The chains of Docker's own name server are in another table.
    return lambda: cluster.run(f"{iptables} -F INPUT && {iptables} -F OUTPUT")


FAULTS = {
    "kill of the primary": kill,
    "switchover": switch_over,
    "partition of the primary": partition,
    "partition of the primary from the cluster only": partition_from_the_cluster,
}


class Outcome(NamedTuple):
    """The writes of one form of the service during a failover."""

    lost: int  # Acknowledged writes that are not in the database.
    copies: int  # The number of heroes that one write created, at most.
    resumed: float  # Seconds from the election to the first write.
    slowest: float  # Seconds of the slowest response.
    statuses: Counter[int]  # After the fault.


def fail_over(
    cluster: Cluster, fault: str, round_trip: float, figures: list[str], note: str = ""
) -> dict[str, Outcome]:
    """Inject the fault under load, wait until writes resume, heal it, and count the writes."""
    primary = cluster.settled()
    with ExitStack() as running:
        running.enter_context(cluster.round_trip(round_trip))
        loads = {form: running.enter_context(writing(port)) for form, port in cluster.forms.items()}
        elected = running.enter_context(election(cluster, primary))
        time.sleep(3)
        begun = time.monotonic()
        heal = FAULTS[fault](cluster, primary)
        try:
            while not (elected and all(resumed(load, elected[0], True) for load in loads.values())):
                assert time.monotonic() < begun + 90, "the writes do not resume"
                time.sleep(0.1)
            time.sleep(3)
        finally:
            heal()
    new_primary = cluster.settled()
    assert new_primary != primary, "the control: the primary has changed"

    outcomes = {}
    for form, load in loads.items():
        after = resumed(load, elected[0]) - elected[0]
        after_with_key = resumed(load, elected[0], True) - elected[0]
        last_before = max(w.end for w in load if w.status == 200 and w.end < elected[0])
        pause = after + elected[0] - last_before
        acknowledged = {write.name for write in load if write.status == 200}
        with cluster.connect(cluster.address(new_primary)) as connection:
            names = "SELECT name FROM hero WHERE name = ANY(%s)"
            found = Counter(
                name for (name,) in connection.execute(names, (list(acknowledged),)).fetchall()
            )
        outcomes[form] = outcome = Outcome(
            len(acknowledged - found.keys()),
            max(found.values()),
            after,
            max(write.end - write.start for write in load),
            Counter(write.status for write in load if write.end > begun),
        )
        figures.append(
            f"{fault}{note}, round trip {round_trip} s, {form}: election after"
            f" {elected[0] - begun:.1f} s, first write {after:.1f} s later, with a key"
            f" {after_with_key:.1f} s later, no write for {pause:.1f} s,"
            f" slowest response {outcome.slowest:.1f} s, {len(acknowledged)} acknowledged,"
            f" {outcome.lost} lost, statuses {dict(outcome.statuses)}"
        )
    return outcomes


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("round_trip", [0, 0.2])
def test_no_acknowledged_write_is_lost_in_a_failover(
    started: Cluster,
    fault: str,
    round_trip: float,
    run: int,  # noqa: ARG001
    figures: list[str],
) -> None:
    for outcome in fail_over(started, fault, round_trip, figures).values():
        assert outcome.lost == 0
        assert outcome.copies == 1
        assert set(outcome.statuses) <= {200, 503}, started.errors()
        assert outcome.resumed < 2
        assert outcome.slowest < DATABASE_TIMEOUT + 2


def test_without_a_synchronous_standby_acknowledged_writes_are_lost(
    started: Cluster, figures: list[str]
) -> None:
    """The control for the previous test: the primary serves until it gives up its role."""
    primary = started.settled()
    edit = (
        f"docker compose exec -T {primary} patronictl --config-file /etc/patroni/heroes.yml"
        " edit-config --force --set synchronous_mode="
    )
    started.run(f"{edit}false")
    started.synchronous = False
    try:
        time.sleep(10)  # Patroni reads its configuration every few seconds.
        fault = "partition of the primary from the cluster only"
        outcomes = fail_over(started, fault, 0, figures, " without a synchronous standby")
    finally:
        started.run(f"{edit}true")
        started.synchronous = True
    assert sum(outcome.lost for outcome in outcomes.values()) > 0


def resumed(load: list[Write], elected: float, has_key: bool | None = None) -> float:
    """The time of the first 200 after the election, or 0. Of all writes, or those with a key."""
    # A copy, because the clients append to the list.
    return min(
        (
            write.end
            for write in load[:]
            if write.status == 200 and write.end > elected and has_key in (None, write.has_key)
        ),
        default=0,
    )


def test_writes_continue_after_the_loss_of_the_synchronous_standby(
    started: Cluster, figures: list[str]
) -> None:
    cluster = started
    primary = cluster.settled()
    with cluster.connect(cluster.address(primary)) as connection:
        names = "SELECT application_name FROM pg_stat_replication WHERE sync_state = 'sync'"
        [(standby,)] = connection.execute(names).fetchall()
    with ExitStack() as running:
        loads = {form: running.enter_context(writing(port)) for form, port in cluster.forms.items()}
        time.sleep(3)
        heal = partition(cluster, standby)
        try:
            time.sleep(20)
        finally:
            heal()
    assert cluster.settled() == primary
    for form, load in loads.items():
        ends = sorted(write.end for write in load if write.status == 200)
        pause = max(later - earlier for earlier, later in itertools.pairwise(ends))
        statuses = Counter(write.status for write in load)
        figures.append(
            f"partition of the synchronous standby, {form}: no write for {pause:.1f} s,"
            f" statuses {dict(statuses)}"
        )
        assert set(statuses) <= {200, 503}
        assert ends[-1] - ends[0] > 20

"""`make bench`: compare this service, the tutorial's code and a hand-written peer.

In each round every contestant serves every kind of request in turn, so that other load on the
machine affects all of them. The report contains the medians over the rounds.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.processes import cpu_seconds, memory, tree
from benchmarks.servers import BIN, CONTESTANTS, Postgres, Service, postgres, run, service

HERE = Path(__file__).parent
OPERATIONS = ("read", "list", "create", "update")
HEROES = 100_000
CONNECTIONS = 32
PACKAGES = (
    "fastapi",
    "starlette",
    "sqlmodel",
    "sqlalchemy",
    "psycopg",
    "uvicorn",
    "gunicorn",
    "asyncpg",
)


def wrk(target: Service, operation: str, seconds: float, connections: int, heroes: int) -> Any:
    """Keep the connections busy for some seconds and return the counts from wrk."""
    done = subprocess.run(
        [
            *("wrk", "--threads", str(min(2, connections)), "--connections", str(connections)),
            *("--duration", f"{seconds}s", "--timeout", "10s", "--script", HERE / "requests.lua"),
            f"http://127.0.0.1:{target.port}",
        ],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OPERATION": operation, "HEROES": str(heroes)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def measured(
    target: Service, database: Postgres, operation: str, seconds: float, **load: int
) -> dict[str, float]:
    """The rate, the latencies in ms, and each side's CPU time in µs per request."""
    load = {"connections": CONNECTIONS, "heroes": HEROES} | load
    before = cpu_seconds(target.pid), cpu_seconds(database.pid)
    result = wrk(target, operation, seconds, **load)
    after = cpu_seconds(target.pid), cpu_seconds(database.pid)
    requests = result["requests"] or math.nan  # The tutorial's code can hang.
    return {
        "rate": result["requests"] / result["seconds"],
        "p50": result["p50"],
        "p99": result["p99"],
        "errors": result["errors"],
        "cpu": (after[0] - before[0]) / requests * 1e6,
        "database_cpu": (after[1] - before[1]) / requests * 1e6,
    }


def side_by_side(
    services: list[Service], database: Postgres, rounds: int, seconds: int
) -> dict[str, Any]:
    results: dict[str, Any] = {o: {s.name: [] for s in services} for o in OPERATIONS}
    for number in range(rounds + 1):
        for operation in OPERATIONS:
            for target in services:
                # The first round is a warm-up. It is shorter and does not count.
                found = measured(target, database, operation, seconds if number else 2)
                if number:
                    results[operation][target.name].append(found)
                print(
                    f"round {number} {operation:6} {target.name:9} {found['rate']:8.0f}/s"
                    f" p99 {found['p99']:6.1f} ms, {found['cpu']:5.0f} µs,"
                    f" {found['errors']} errors",
                    flush=True,
                )
    return results


def round_trips(services: list[Service], database: Postgres) -> dict[str, Any]:
    """SQL statements per request as the server counts them, with BEGIN and COMMIT."""
    database.count_statements("top")
    counts: dict[str, Any] = {}
    for operation in OPERATIONS:
        for target in services:
            before = database.statements()
            requests = wrk(target, operation, 2, CONNECTIONS, HEROES)["requests"]
            sent = database.statements() - before - 1
            counts.setdefault(operation, {})[target.name] = sent / requests
    database.count_statements("none")
    return counts


def connections(services: list[Service], database: Postgres, seconds: int) -> dict[str, Any]:
    """Reads per second, by number of connections."""
    found: dict[str, Any] = {}
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for target in services:
            result = measured(target, database, "read", seconds, connections=count)
            found.setdefault(target.name, {})[count] = result
            print(f"{count} connections {target.name} {result['rate']:.0f}/s", flush=True)
    return found


def cold_start(folder: Path, database: Postgres) -> dict[str, float]:
    """Seconds from the command to the first response, the median of three starts."""
    found = {}
    for name in CONTESTANTS:
        times = []
        for _ in range(3):
            start = time.monotonic()
            with service(name, 8199, database.url, folder / "cold.log"):
                times.append(time.monotonic() - start)
        found[name] = statistics.median(times)
    return found


def observed(folder: Path, database: Postgres, rounds: int, seconds: int) -> dict[str, Any]:
    """Reads with and without access log, metrics and request ids."""
    results: dict[str, Any] = {"as shipped": [], "all of them off": []}
    with (
        service("heroes", 8191, database.url, folder / "on.log") as on,
        service("bare", 8192, database.url, folder / "off.log") as off,
    ):
        # The difference is small: take many short measurements, and alternate which goes first.
        targets = {"as shipped": on, "all of them off": off}
        for number in range(rounds * seconds + 1):
            for name in sorted(targets, reverse=bool(number % 2)):
                found = measured(targets[name], database, "read", 1 if number else 2)
                if number:
                    results[name].append(found)
    return results


def growth(folder: Path, database: Postgres, sizes: list[int], seconds: int) -> dict[str, Any]:
    """Reads and lists per second as the table grows, with the database's µs per request."""
    found: dict[str, Any] = {}
    with service("heroes", 8193, database.url, folder / "growth.log") as target:
        for size in sizes:
            database.load(size)
            for operation in ("read", "list"):
                wrk(target, operation, 2, CONNECTIONS, size)
                result = measured(target, database, operation, seconds, heroes=size)
                found.setdefault(operation, {})[size] = result
                print(f"{size} heroes: {operation} {result['rate']:.0f}/s", flush=True)
    return found


def machine(database: Postgres) -> dict[str, Any]:
    model = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": f"{os.cpu_count()} cores, {model[0] if model else platform.machine()}",
        "python": platform.python_version(),
        "postgresql": database.version,
        "packages": {name: version(name) for name in PACKAGES},
    }


def transfers(folder: Path, database: Postgres) -> dict[str, Any]:
    """Seconds to import and export a million heroes, as reported and including start-up."""
    file = folder / "in.csv"
    with file.open("w") as lines:
        lines.write("name,age,secret_name\n")
        lines.writelines(f"Hero {n},{n % 100},Secret {n}\n" for n in range(1_000_000))
    columns = "(name, age, secret_name)"
    rows = "(SELECT id, name, age FROM hero ORDER BY id)"

    times: dict[str, Any] = {
        kind: {r"\copy": [], "heroes": [], "with its start": []} for kind in ("import", "export")
    }

    def command(kind: str, file: Path) -> None:
        start = time.monotonic()
        output = run([BIN / "heroes", kind, file], database.url).splitlines()[-1]
        times[kind]["with its start"].append(time.monotonic() - start)
        times[kind]["heroes"].append(1e6 / int(output.split()[-3].replace(",", "")))

    for _ in range(3):
        database.empty()
        times["import"][r"\copy"].append(
            database.copy(f"hero {columns} FROM '{file}' (FORMAT csv, HEADER)", folder)
        )
        database.empty()
        command("import", file)
        times["export"][r"\copy"].append(
            database.copy(f"{rows} TO '{folder / 'psql.csv'}' (FORMAT csv, HEADER)", folder)
        )
        command("export", folder / "own.csv")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement")
    parser.add_argument("--only-side-by-side", action="store_true")
    parser.add_argument("--largest", type=int, default=10_000_000, help="table")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("make bench needs wrk, the HTTP load generator: apt-get install wrk")
    folder = Path(tempfile.mkdtemp(prefix="heroes-bench-"))
    rounds, seconds = options.rounds, options.seconds
    with postgres() as database:
        database.load(HEROES)
        result: dict[str, Any] = {
            "machine": machine(database),
            "rounds": rounds,
            "seconds": seconds,
        }
        with ExitStack() as stack:
            services = [
                stack.enter_context(service(name, 8101 + n, database.url, folder / f"{name}.log"))
                for n, name in enumerate(CONTESTANTS)
            ]
            result["side by side"] = side_by_side(services, database, rounds, seconds)
            result["memory"] = {s.name: memory(tree(s.pid)[1]) for s in services}
            if not options.only_side_by_side:
                result["round trips"] = round_trips(services, database)
                result["connections"] = connections(services, database, 3)
        if not options.only_side_by_side:
            result["observed"] = observed(folder, database, rounds, seconds)
            result["cold start"] = cold_start(folder, database)
            sizes = [10_000, 100_000, 1_000_000, 10_000_000]
            result["growth"] = growth(
                folder, database, [size for size in sizes if size <= options.largest], 3
            )
            result["transfers"] = transfers(folder, database)
    shutil.rmtree(folder)
    report.write(result, HERE)


main()

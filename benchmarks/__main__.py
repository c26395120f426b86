"""`make bench`: compare this service, the tutorial's code and hand-written peers.

In each round every contestant serves every kind of request in turn, so that other load on the
machine affects all of them. The report contains the medians over the rounds.
"""

import argparse
import http.client
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
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import report, wrk
from benchmarks.processes import cpu_seconds, memory, tree
from benchmarks.servers import (
    BARE,
    BIN,
    CONTESTANTS,
    Postgres,
    Service,
    image,
    install_fastify,
    postgres,
    run,
    service,
    settle,
)

HERE = Path(__file__).parent
OPERATIONS = ("read", "list", "create", "update", "mixed")
HEROES = 100_000
CONNECTIONS = 32
PACKAGES = (
    *("fastapi", "starlette", "sqlmodel", "sqlalchemy", "psycopg", "uvicorn", "gunicorn"),
    *("pydantic", "asyncpg"),
)


def send(target: Service, operation: str, seconds: float, connections: int, heroes: int) -> Any:
    """Keep the connections busy for some seconds and return the counts from wrk."""
    environment = {"OPERATION": operation, "HEROES": str(heroes)}
    return json.loads(wrk.run("requests.lua", target.port, seconds, connections, **environment))


def measured(
    target: Service, database: Postgres, operation: str, seconds: float, **load: int
) -> dict[str, float]:
    """The rate, the latencies in ms, and each side's CPU time in µs per request."""
    load = {"connections": CONNECTIONS, "heroes": HEROES} | load
    before = cpu_seconds(target.pid), cpu_seconds(database.pid)
    result = send(target, operation, seconds, **load)
    after = cpu_seconds(target.pid), cpu_seconds(database.pid)
    settle(target)
    requests = result["requests"] or math.nan  # The tutorial's code can hang.
    latencies = ("p50", "p95", "p99")
    return {
        "rate": result["requests"] / result["seconds"],
        **{each: result[each] if result["requests"] else math.nan for each in latencies},
        "errors": result["errors"],
        "cpu": (after[0] - before[0]) / requests * 1e6,
        "database_cpu": (after[1] - before[1]) / requests * 1e6,
    }


def exchange(target: Service) -> list[tuple[int, object]]:
    """Status and body of some responses; of a refusal, only its status."""
    connection = http.client.HTTPConnection("127.0.0.1", target.port)

    def respond(method: str, path: str, body: object = None) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        response = connection.getresponse()
        content = json.loads(response.read())
        return response.status, None if response.status == 422 else content

    status, created = respond("POST", "/heroes/", {"name": "Deadpond", "secret_name": "Dive"})
    path = f"/heroes/{created.pop('id')}"
    found = [
        respond("PATCH", path, {"age": 29}),
        respond("PATCH", path, {"name": "Rusty-Man", "secret_name": "Tommy Sharp"}),
        respond("GET", path),
    ]
    for _, hero in found:
        hero.pop("id")
    return [
        (status, created),
        *found,
        respond("GET", "/heroes/?offset=7&limit=3"),
        respond("GET", "/heroes/2000000000"),
        respond("PATCH", "/heroes/2000000000", {"age": 29}),
        respond("GET", "/heroes/none"),
        respond("GET", "/heroes/?limit=101"),
        respond("POST", "/heroes/", {"name": "Deadpond"}),
    ]


def side_by_side(
    services: list[Service],
    database: Postgres,
    rounds: int,
    seconds: int,
    operations: Sequence[str],
    counts: Sequence[int],
) -> dict[str, Any]:
    """Measure every operation with every number of connections, the services in turn."""
    names = [target.name for target in services]
    results: dict[str, Any] = {
        operation: {count: {name: [] for name in names} for count in counts}
        for operation in operations
    }
    for target in services:  # The first round is a warm-up. It does not count.
        for operation in operations:
            measured(target, database, operation, 1)
    for number in range(rounds):
        database.load(HEROES)
        first = number % len(services)
        for operation in operations:
            for count in counts:
                for target in services[first:] + services[:first]:
                    found = measured(target, database, operation, seconds, connections=count)
                    results[operation][count][target.name].append(found)
                    print(
                        f"round {number + 1} {operation:6} {count:3} {target.name:9}"
                        f" {found['rate']:8.0f}/s p99 {found['p99']:6.1f} ms,"
                        f" {found['cpu']:5.0f} + {found['database_cpu']:4.0f} µs,"
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
            requests = send(target, operation, 2, CONNECTIONS, HEROES)["requests"]
            sent = database.statements() - before - 1
            counts.setdefault(operation, {})[target.name] = sent / (requests or math.nan)
    database.count_statements("none")
    return counts


def cold_start(
    commands: dict[str, list[str]], folder: Path, database: Postgres
) -> dict[str, float]:
    """Seconds from the command to the first response, the median of three starts."""
    found = {}
    for name, command in commands.items():
        times = []
        for _ in range(3):
            start = time.monotonic()
            with service(name, command, database.url, folder):
                times.append(time.monotonic() - start)
        found[name] = statistics.median(times)
    return found


def observed(folder: Path, database: Postgres, rounds: int, seconds: int) -> dict[str, Any]:
    """Reads with and without access log, metrics and request ids."""
    commands = {"as shipped": CONTESTANTS["heroes"], "all of them off": BARE}
    results: dict[str, Any] = {name: [] for name in commands}
    with ExitStack() as stack:
        targets = [
            stack.enter_context(service(name, command, database.url, folder))
            for name, command in commands.items()
        ]
        # The difference is small: take many short measurements, and alternate which goes first.
        for number in range(rounds * seconds + 1):
            for target in targets[:: -1 if number % 2 else 1]:
                found = measured(target, database, "read", 1)
                if number:
                    results[target.name].append(found)
    return results


def growth(folder: Path, database: Postgres, sizes: list[int], seconds: int) -> dict[str, Any]:
    """Reads and lists per second as the table grows, with the database's µs per request."""
    found: dict[str, Any] = {}
    with service("heroes", CONTESTANTS["heroes"], database.url, folder) as target:
        for size in sizes:
            database.load(size)
            for operation in ("read", "list"):
                send(target, operation, 2, CONNECTIONS, size)
                result = measured(target, database, operation, seconds, heroes=size)
                found.setdefault(operation, {})[size] = result
                print(f"{size} heroes: {operation} {result['rate']:.0f}/s", flush=True)
    return found


def machine(database: Postgres, fastify: bool) -> dict[str, Any]:
    model = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = {name: version(name) for name in PACKAGES}
    if fastify:
        packages["node"] = subprocess.check_output(["node", "--version"], text=True).strip()
        packages |= json.loads((HERE / "fastify" / "package.json").read_text())["dependencies"]
    return {
        "cpu": f"{os.cpu_count()} cores, {model[0] if model else platform.machine()}",
        "python": platform.python_version(),
        "postgresql": database.version,
        "packages": packages,
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


def variants(
    commands: dict[str, list[str]], folder: Path, database: Postgres, rounds: int, seconds: int
) -> dict[str, Any]:
    """Pools of 4 and 16 connections per worker, and the service on the Python of its image."""
    with ExitStack() as stack:
        services = [
            stack.enter_context(
                service(f"{name}, pool of {size}", command, database.url, folder, size)
            )
            for name, command in commands.items()
            if name != "tutorial"
            for size in (4, 16)
        ]
        try:
            services.append(stack.enter_context(image(database.url)))
        except (subprocess.CalledProcessError, TimeoutError) as error:
            print(f"Without the service's image: {getattr(error, 'stderr', '') or error}")
        counts = (CONNECTIONS, 256)
        return side_by_side(services, database, rounds, seconds, OPERATIONS, counts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, help="of each measurement: 2, complete 3")
    parser.add_argument("--only-side-by-side", action="store_true", help="with 32 connections")
    parser.add_argument(
        "--complete", action="store_true", help="and write the result to benchmarks/"
    )
    parser.add_argument("--largest", type=int, default=10_000_000, help="table")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("make bench needs wrk, the HTTP load generator: apt-get install wrk")
    rounds, seconds = options.rounds, options.seconds or (3 if options.complete else 2)
    operations: Sequence[str] = OPERATIONS[:-1]  # Without the mixed load.
    counts = [1, CONNECTIONS, 256]
    if options.only_side_by_side:
        operations, counts = OPERATIONS, [CONNECTIONS]
    elif options.complete:
        operations, counts = OPERATIONS, [1, 8, CONNECTIONS, 128, 256, 512]
    with tempfile.TemporaryDirectory(prefix="heroes-bench-") as name, postgres() as database:
        folder = Path(name)
        fastify = install_fastify(folder / "fastify")
        commands = CONTESTANTS | ({"fastify": fastify} if fastify else {})
        database.load(HEROES)
        result: dict[str, Any] = {
            "machine": machine(database, bool(fastify)),
            "rounds": rounds,
            "seconds": seconds,
        }
        with ExitStack() as stack:
            services = [
                stack.enter_context(service(name, command, database.url, folder))
                for name, command in commands.items()
            ]
            expected = exchange(services[0])
            for target in services[1:]:
                if (found := exchange(target)) != expected:
                    sys.exit(f"{target.name} responds {found}\nbut heroes responds {expected}")
            result["side by side"] = side_by_side(
                services, database, rounds, seconds, operations, counts
            )
            result["memory"] = {s.name: memory(tree(s.pid)[1]) for s in services}
            if options.complete:
                result["round trips"] = round_trips(services, database)
        try:
            if options.complete:
                result["variants"] = variants(commands, folder, database, rounds, seconds)
                result["observed"] = observed(folder, database, rounds, seconds)
                result["cold start"] = cold_start(commands, folder, database)
                sizes = [10_000, 100_000, 1_000_000, 10_000_000]
                result["growth"] = growth(
                    folder, database, [size for size in sizes if size <= options.largest], 3
                )
                result["transfers"] = transfers(folder, database)
        finally:  # The results so far, if a later section fails.
            if options.complete:
                report.write(result, HERE)
            print(report.markdown(result))


main()

"""The results as tables and a plot: medians with their spread, and ratios to the peers."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "heroes"

GOALS: dict[str, dict[str, float]] = {
    "tutorial": {"read": 7, "list": 5, "create": 4, "update": 4},
    "asyncpg": {"read": 1.5, "list": 1.2, "create": 0.8},
}
_BEGIN, _END = "<!-- make bench writes this -->", "<!-- to here -->"
COLORS = {"heroes": "#1b7f5c", "tutorial": "#b0b7c3", "asyncpg": "#5b7db1"}


def write(result: dict[str, Any], folder: Path) -> None:
    """Write result.json, result.svg, and the tables between the two markers in README.md."""
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    _plot(result, folder / "result.svg")
    readme = folder / "README.md"
    before, _, rest = readme.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    readme.write_text(f"{before}{_BEGIN}\n{_markdown(result)}{_END}{after}")


def _of(rounds: list[dict[str, float]], name: str) -> float:
    return median(each[name] for each in rounds)


def _spread(rounds: list[dict[str, float]]) -> str:
    rates = [each["rate"] for each in rounds]
    return f"{median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    parts = [
        f"{machine['cpu']}, Python {machine['python']}, PostgreSQL {machine['postgresql']},"
        f" {packages}. {result['rounds']} rounds of {result['seconds']} s each."
        " The tables show medians.\n",
        _side_by_side(result["side by side"]),
        _ratios(result["side by side"]),
        "Memory of one worker at the end (PSS): "
        + ", ".join(f"{name} {bytes_ / 1e6:.0f} MB" for name, bytes_ in result["memory"].items())
        + ".\n",
    ]
    if "growth" in result:
        parts += [
            _round_trips(result["round trips"]),
            _connections(result["connections"]),
            _growth(result["growth"]),
            _observed(result["observed"]),
            _transfers(result["transfers"]),
            "Cold start, from the command to the first response: "
            + ", ".join(f"{name} {time:.1f} s" for name, time in result["cold start"].items())
            + ".\n",
        ]
    return "\n".join(parts)


def _side_by_side(results: dict[str, Any]) -> str:
    header = ["", "", "requests/s", "p50 ms", "p99 ms", "CPU µs", "PostgreSQL µs", "errors"]
    rows = [
        [
            operation if not number else "",
            name,
            _spread(rounds),
            f"{_of(rounds, 'p50'):.1f}",
            f"{_of(rounds, 'p99'):.1f}",
            f"{_of(rounds, 'cpu'):.0f}",
            f"{_of(rounds, 'database_cpu'):.0f}",
            f"{sum(each['errors'] for each in rounds):.0f}",
        ]
        for operation, contestants in results.items()
        for number, (name, rounds) in enumerate(contestants.items())
    ]
    return _table(header, rows)


def _ratios(results: dict[str, Any]) -> str:
    """Ratios of rates and CPU times, each computed within one round, then the median."""
    rows = []
    for operation, contestants in results.items():
        ours = contestants["heroes"]
        row = [operation]
        for peer in ("tutorial", "asyncpg"):
            theirs = contestants[peer]
            rate = median(a["rate"] / b["rate"] for a, b in zip(ours, theirs, strict=True))
            cpu = median(b["cpu"] / a["cpu"] for a, b in zip(ours, theirs, strict=True))
            goal = GOALS[peer].get(operation)
            row += [f"{rate:.1f}", f"{goal}" if goal else "", f"{cpu:.1f}"]
        row.append(
            f"{_of(ours, 'p99'):.1f} / {_of(contestants['tutorial'], 'p50'):.1f}",
        )
        rows.append(row)
    header = [
        *("", "our rate / tutorial's", "goal", "tutorial's CPU / ours"),
        *("our rate / asyncpg's", "goal", "asyncpg's CPU / ours"),
        "our p99 / tutorial's p50, ms",
    ]
    return _table(header, rows)


def _round_trips(counts: dict[str, Any]) -> str:
    names = list(next(iter(counts.values())))
    rows = [
        [operation, *(f"{count:.2f}" for count in of.values())] for operation, of in counts.items()
    ]
    return "SQL statements per request:\n\n" + _table(["", *names], rows)


def _connections(found: dict[str, Any]) -> str:
    counts = list(next(iter(found.values())))
    rows = [
        [name, *(f"{result['rate']:,.0f}" for result in of.values())] for name, of in found.items()
    ]
    return "Reads per second, by number of connections:\n\n" + _table(["", *map(str, counts)], rows)


def _growth(found: dict[str, Any]) -> str:
    sizes = [f"{int(size):,}" for size in next(iter(found.values()))]
    rows = [
        [
            operation,
            *(f"{each['rate']:,.0f}/s, {each['database_cpu']:.0f} µs" for each in of.values()),
        ]
        for operation, of in found.items()
    ]
    return "Rate and PostgreSQL CPU per request, by number of heroes:\n\n" + _table(
        ["", *sizes], rows
    )


def _observed(found: dict[str, Any]) -> str:
    (name, ours), (other, bare) = found.items()
    rate = median(a["rate"] / b["rate"] for a, b in zip(ours, bare, strict=True))
    cpu = _of(ours, "cpu"), _of(bare, "cpu")
    return (
        f"Reads with access log, metrics and request ids {name}: {rate:.2f} of the rate with"
        f" {other}, {cpu[0]:.0f} µs of CPU instead of {cpu[1]:.0f}.\n"
    )


def _transfers(found: dict[str, Any]) -> str:
    rows = []
    for kind, by in found.items():
        copy, ours, whole = (median(times) for times in by.values())
        seconds = (f"{time:.1f} s" for time in (ours, whole, copy))
        rows.append([kind, *seconds, f"{copy / ours:.2f}"])
    header = ["", "`heroes`", "with start-up", r"psql's `\copy`", r"our rate / `\copy`'s"]
    return "A million heroes, with the command `heroes`:\n\n" + _table(header, rows)


def _plot(result: dict[str, Any], file: Path) -> None:
    operations = result["side by side"]
    figure, axes = plt.subplots(1, len(operations), figsize=(11, 3.2), layout="constrained")
    for axis, (operation, contestants) in zip(axes, operations.items(), strict=True):
        for place, (name, rounds) in enumerate(contestants.items()):
            rates = [each["rate"] for each in rounds]
            middle = median(rates)
            spread = [[middle - min(rates)], [max(rates) - middle]]
            axis.bar(place, middle, yerr=spread, capsize=4, color=COLORS[name], label=name)
        axis.set_title(operation)
        axis.set_xticks([])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("requests a second")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)

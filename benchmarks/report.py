"""The results as tables and a plot: medians with their spread, and ratios to the peers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.tables import replace_section, table

mpl.use("svg")

# Our rate divided by the peer's, by number of connections.
GOALS: dict[str, dict[int, dict[str, float]]] = {
    "tutorial": {32: {"read": 10, "list": 10, "create": 12, "update": 12}},
    "asyncpg": {
        1: {"read": 1.1, "list": 1.1, "create": 1.1, "update": 1.1},
        32: {"read": 2.0, "list": 2.0, "create": 2.2, "update": 2.0},
    },
    "lean": {32: {"read": 1.0, "list": 1.0, "create": 1.0, "update": 1.0}},
    "fastify": {
        128: {"read": 1.0, "list": 1.0, "create": 1.0, "update": 1.0},
        256: {"read": 0.9, "list": 0.7, "create": 1.0},
    },
}
# Each colour has a contrast of at least 3 to 1 on a light and on a dark README page.
STYLES: dict[str, dict[str, Any]] = {
    "heroes": {"color": "#0f9d6b", "marker": "o", "linewidth": 2.4},
    "tutorial": {"color": "#7d8590", "marker": "s"},
    "asyncpg": {"color": "#4a86e8", "marker": "^"},
    "lean": {"color": "#a371d8", "marker": "D"},
    "fastify": {"color": "#d0702b", "marker": "v"},
}
INK = "#757d88"
mpl.rcParams |= {
    "svg.hashsalt": "heroes",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def write(result: dict[str, Any], folder: Path) -> None:
    """Write result.json, result.svg, and the tables between the two markers in README.md."""
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    _plot(result, folder / "result.svg")
    replace_section(folder / "README.md", "<!-- make bench writes this -->", markdown(result))


def _of(rounds: list[dict[str, float]], name: str) -> float:
    # Without a response in a round there is no latency and no time per request.
    return median([each[name] for each in rounds if not math.isnan(each[name])] or [math.nan])


def _spread(rounds: list[dict[str, float]]) -> str:
    rates = [each["rate"] for each in rounds]
    return f"{median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def markdown(result: dict[str, Any]) -> str:
    """Return the result as tables."""
    machine = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    parts = [
        f"{machine['cpu']}, Python {machine['python']}, PostgreSQL {machine['postgresql']},"
        f" {packages}. {result['rounds']} rounds of {result['seconds']} s each."
        " The tables show medians.\n",
        _side_by_side(result["side by side"]),
        _ratios(result["side by side"]),
        _by_connections(result["side by side"]),
        "Memory of one worker at the end (PSS): "
        + ", ".join(f"{name} {bytes_ / 1e6:.0f} MB" for name, bytes_ in result["memory"].items())
        + ".\n",
    ]
    sections: dict[str, Callable[[Any], str]] = {
        "round trips": _round_trips,
        "variants": _variants,
        "growth": _growth,
        "observed": _observed,
        "transfers": _transfers,
        "cold start": _cold_start,
    }
    parts += [section(result[name]) for name, section in sections.items() if name in result]
    return "\n".join(parts)


def _side_by_side(results: dict[str, Any]) -> str:
    header = ["", "32 connections", "requests/s", "p50 ms", "p95 ms", "p99 ms", "CPU µs"]
    header += ["PostgreSQL µs", "errors"]
    rows = [
        [
            operation if not number else "",
            name,
            _spread(rounds),
            *(f"{_of(rounds, latency):.1f}" for latency in ("p50", "p95", "p99")),
            f"{_of(rounds, 'cpu'):.0f}",
            f"{_of(rounds, 'database_cpu'):.0f}",
            f"{sum(each['errors'] for each in rounds):.0f}",
        ]
        for operation, by_count in results.items()
        for number, (name, rounds) in enumerate(by_count[32].items())
    ]
    return table(header, rows)


def _cpu(each: dict[str, float]) -> float:
    return each["cpu"] + each["database_cpu"]


def _ratios(results: dict[str, Any]) -> str:
    """Ratios to each peer, each computed within one round, then the median, with the goals."""
    rows = []
    for peer, by_count in GOALS.items():
        for count, goals in by_count.items():
            row = [f"rate / {peer}'s", str(count)]
            for operation, measured in results.items():
                contestants = measured.get(count, {})
                if peer not in contestants:
                    continue
                pairs = list(zip(contestants["heroes"], contestants[peer], strict=True))
                rate = median(ours["rate"] / (theirs["rate"] or math.nan) for ours, theirs in pairs)
                cpu = median(_cpu(theirs) / _cpu(ours) for ours, theirs in pairs)
                goal = goals.get(operation)
                cell = f"{rate:.2f} (goal {goal})" if goal else f"{rate:.2f}"
                row.append(f"{_bold(cell, goal and rate < goal)}, CPU {cpu:.2f}")
            rows += [row] if row[2:] else []
    row = ["p99 ms / the peers' lowest", "256"]
    for measured in results.values():
        p99 = {
            name: _of(rounds, "p99")
            for name, rounds in measured.get(256, {}).items()
            if _of(rounds, "rate")
        }
        if p99:
            ours, best = p99.pop("heroes"), min(p99.values())
            row.append(_bold(f"{ours:.1f} / {best:.1f}", ours > best))
    rows += [row] if row[2:] else []
    return (
        "Compared with the peers. Bold: the goal is not met. CPU is the peer's CPU time per request"
        " divided by ours, PostgreSQL's included.\n\n"
        + table(["our", "connections", *results], rows)
    )


def _bold(cell: str, bold: object) -> str:
    return f"**{cell}**" if bold else cell


def _by_connections(results: dict[str, Any]) -> str:
    """All points in short: rate, p99, and CPU time per request with PostgreSQL's."""
    counts = list(next(iter(results.values())))
    rows = [
        [
            operation if not number else "",
            name,
            *(_short(by_count[count][name]) for count in counts),
        ]
        for operation, by_count in results.items()
        for number, name in enumerate(by_count[counts[0]])
    ]
    title = "Requests/s, p99, and CPU µs + PostgreSQL µs, by number of connections:\n\n"
    return title + table(["", "", *map(str, counts)], rows)


def _short(rounds: list[dict[str, float]]) -> str:
    cpu, database_cpu = _of(rounds, "cpu"), _of(rounds, "database_cpu")
    rate, p99 = _of(rounds, "rate"), _of(rounds, "p99")
    if not rate:
        return "no response"
    return f"{rate:,.0f}/s<br>{p99:.1f} ms<br>{cpu:.0f} + {database_cpu:.0f} µs"


def _round_trips(counts: dict[str, Any]) -> str:
    names = list(next(iter(counts.values())))
    rows = [
        [operation, *(f"{count:.2f}" for count in of.values())] for operation, of in counts.items()
    ]
    return "SQL statements per request:\n\n" + table(["", *names], rows)


def _variants(results: dict[str, Any]) -> str:
    return "Other pool sizes and Python versions:\n\n" + _by_connections(results)


def _growth(found: dict[str, Any]) -> str:
    sizes = [f"{int(size):,}" for size in next(iter(found.values()))]
    rows = [
        [
            operation,
            *(f"{each['rate']:,.0f}/s, {each['database_cpu']:.0f} µs" for each in of.values()),
        ]
        for operation, of in found.items()
    ]
    return "Rate and PostgreSQL CPU per request, by number of heroes:\n\n" + table(
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
    return "A million heroes, with the command `heroes`:\n\n" + table(header, rows)


def _cold_start(found: dict[str, float]) -> str:
    times = ", ".join(f"{name} {time:.1f} s" for name, time in found.items())
    return f"Cold start, from the command to the first response: {times}.\n"


def _plot(result: dict[str, Any], file: Path) -> None:
    """Rate and p99 over connections, in colours for light and dark pages, without background."""
    results = result["side by side"]
    names = list(next(iter(next(iter(results.values())).values())))
    figure, axes = plt.subplots(2, len(results), figsize=(11, 5), layout="constrained", sharex=True)
    for column, (operation, by_count) in enumerate(results.items()):
        for axis, measure in zip(axes[:, column], ("rate", "p99"), strict=True):
            for name in names:
                medians = [_of(by_count[count][name], measure) for count in by_count]
                style = {"linewidth": 1.3, "markersize": 3.5} | STYLES[name]
                axis.plot(list(by_count), medians, label=name, **style)
            axis.set_xscale("log", base=2)
            axis.set_xticks([1, 8, 32, 128, 512], ["1", "8", "32", "128", "512"])
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color=INK, alpha=0.2)
        axes[0, column].set_title(operation, fontsize=11)
        axes[0, column].set_ylim(bottom=0)
        axes[0, column].yaxis.set_major_formatter(lambda rate, _: f"{rate / 1000:g}k")
        axes[1, column].set_yscale("log")
        axes[1, column].minorticks_off()
        axes[1, column].yaxis.set_major_formatter(lambda latency, _: f"{latency:g}")
        axes[1, column].set_xlabel("connections")
    axes[0, 0].set_ylabel("requests per second")
    axes[1, 0].set_ylabel("p99 latency, ms")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(file, metadata={"Date": None}, transparent=True)
    plt.close(figure)

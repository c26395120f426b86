"""What is measured. Names and units follow https://prometheus.io/docs/practices/naming/.

Under several workers each one writes its values to files in `PROMETHEUS_MULTIPROC_DIR`, which must
be set before this module is imported, and any of them can answer for all.
"""

import os
import platform
from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.metrics_core import InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app import __version__

CONTENT_TYPE = CONTENT_TYPE_LATEST

request_duration = Histogram(
    "http_request_duration_seconds",
    "Time from a request's headers to the end of its answer.",
    ["route", "method", "status"],
    # From the time of one statement to the longest that a unit of work may take.
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
requests_in_progress = Gauge(
    "http_requests_in_progress",
    "Requests that are being answered.",
    multiprocess_mode="livesum",
)
pool_connections_in_use = Gauge(
    "database_pool_connections_in_use",
    "Connections that units of work have taken from the pool.",
    multiprocess_mode="livesum",
)
pool_waiting = Gauge(
    "database_pool_waiting",
    "Units of work that wait for a connection.",
    multiprocess_mode="livesum",
)
hero_read_batch = Histogram(
    "hero_read_batch_size",
    "Reads of single heroes that shared a query.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 100),
)
database_errors = Counter(
    "database_errors",
    "Statements and connections that failed, by the class of the SQLSTATE, or none or timeout.",
    ["sqlstate_class"],
)


class Facts(Collector):
    """What is true of the whole service and is not counted: its build and its schema's revision."""

    def __init__(self, code_revision: str, database_revision: str) -> None:
        self.code_revision = code_revision
        self.database_revision = database_revision

    def collect(self) -> Iterator[Metric]:
        build = {"version": __version__, "python": platform.python_version()}
        yield InfoMetricFamily("heroes_build", "What is running.", value=build)
        schema = {"code": self.code_revision, "database": self.database_revision}
        yield InfoMetricFamily(
            "heroes_schema", "The newest revision of the code, and the database's.", value=schema
        )


def exposition(facts: Facts) -> bytes:
    """All metrics of all workers in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(facts)
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
    return generate_latest(registry) + generate_latest(REGISTRY)

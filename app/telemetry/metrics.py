"""Metrics, named after OpenTelemetry's semantic conventions in Prometheus form.

https://opentelemetry.io/docs/specs/semconv/http/http-metrics/. Each worker writes its values to
files in `PROMETHEUS_MULTIPROC_DIR`, and any worker can return the metrics of all. The variable must
be set before this module is imported.
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

from app import NAME, __version__

CONTENT_TYPE = CONTENT_TYPE_LATEST

# From the time of one statement to the longest time of a call.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

request_duration = Histogram(
    "http_server_request_duration_seconds",
    "Time from the headers of a request to the end of its response.",
    ["http_request_method", "http_route", "http_response_status_code"],
    buckets=_SECONDS,
)
active_requests = Gauge(
    "http_server_active_requests", "Requests in progress.", multiprocess_mode="livesum"
)
connection_count = Gauge(
    "db_client_connection_count",
    "Connections of the pool, by state: used or idle.",
    ["state"],
    multiprocess_mode="livesum",
)
pending_requests = Gauge(
    "db_client_connection_pending_requests",
    "Database calls that wait for a connection.",
    multiprocess_mode="livesum",
)
operation_duration = Histogram(
    "db_client_operation_duration_seconds",
    "Time of a database call, waiting for a connection included.",
    buckets=_SECONDS,
)
batch_size = Histogram(
    "batch_size",
    "Concurrent calls that shared a statement.",
    ["operation"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 100),
)
database_errors = Counter(
    "database_errors",
    "Failed statements and connections, by the class of the SQLSTATE, or none or timeout.",
    ["sqlstate_class"],
)


class Facts(Collector):
    """Facts about the service: its build, and the revision of its schema."""

    def __init__(self, code_revision: str, database_revision: str) -> None:
        self.code_revision = code_revision
        self.database_revision = database_revision

    def collect(self) -> Iterator[Metric]:
        build = {"version": __version__, "python": platform.python_version()}
        yield InfoMetricFamily(f"{NAME}_build", "The running version.", value=build)
        schema = {"code": self.code_revision, "database": self.database_revision}
        yield InfoMetricFamily(
            f"{NAME}_schema", "The revisions of the code and of the database.", value=schema
        )


def exposition(facts: Facts) -> bytes:
    """Return the metrics of all workers in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(facts)
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
    return generate_latest(registry) + generate_latest(REGISTRY)

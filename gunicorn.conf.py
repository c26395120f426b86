"""gunicorn's settings, each with its reason. All others have gunicorn's defaults.

It listens on 127.0.0.1:8000, or on all addresses if PORT is set.
"""

import gc
import itertools
import os
import shutil
import tempfile
import threading

# Libraries that only the workers use. Because the master imports them before it forks, the workers
# share their memory, and start in a third of the time. The master does not import the app, so that
# code that cannot be loaded ends a worker, and SIGHUP loads new code.
import alembic.script  # noqa: F401
import fastapi_offline  # noqa: F401
import psycopg_pool  # noqa: F401
import sqlalchemy.ext.asyncio  # noqa: F401
import sqlmodel  # noqa: F401

from app import NAME
from app.settings import from_environment, log_start
from app.telemetry import logs

# Read in the master too, so that a wrong variable ends the master instead of each worker.
settings = from_environment()

wsgi_app = "app.main:app"
worker_class = "app.server.worker.Worker"
workers = settings.web_concurrency

# Seconds without a heartbeat after which the master kills a worker. The worker sends one each
# second. This does not limit the time of a request: DATABASE_TIMEOUT does.
timeout = 30

# Seconds that an idle connection stays open. A draining worker closes idle connections earlier.
keepalive = settings.keep_alive_seconds

# Only the headers of these proxies name the client.
forwarded_allow_ips = settings.forwarded_allow_ips

# Seconds that a stopping worker has to drain and to complete its last responses. An orchestrator
# must allow more: see stop_grace_period in docker-compose.yml.
graceful_timeout = 30

# The heartbeat is a file. On a disk, a slow write would look like a dead worker.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112, S108

# An unused second way to control the master.
control_socket_disable = True

# gunicorn logs in the same format as the app.
logconfig_dict = logs.configuration(settings.log_level, settings.log_format)

# The folder in which all workers of this master collect their metrics. After a rolling restart the
# new master starts from zero, as after any restart.
_own = f"{NAME}-metrics-{os.getpid()}-"
_metrics = os.environ.get("PROMETHEUS_MULTIPROC_DIR", worker_tmp_dir)
_metrics_error = None
if not os.path.basename(_metrics or "").startswith(_own):  # noqa: PTH119  (HUP runs this again.)
    try:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix=_own, dir=_metrics)
    except OSError as error:
        os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
        _metrics_error = error


def on_starting(server):  # noqa: ANN001
    """Log the database, and warn if there is no folder for the metrics. The service needs none."""
    gc.freeze()  # A collection would write to the memory that the workers share.
    log_start(settings.database_url)
    if _metrics_error:
        message = "Metrics are incomplete: /metrics returns those of one worker: %s"
        server.log.warning(message, _metrics_error)


def pre_fork(server, worker):  # noqa: ANN001
    """Give the worker the lowest number that no other worker has."""
    taken = {other.number for other in server.WORKERS.values()}
    worker.number = next(number for number in itertools.count(1) if number not in taken)


def post_fork(server, worker):  # noqa: ANN001, ARG001
    """Let the worker continue the metrics of the ended worker with its number."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        from app.telemetry import metric_files

        metric_files.use(worker.number)


def post_worker_init(worker):  # noqa: ANN001
    """Run in each worker, after it has loaded the app."""
    # Excludes the loaded objects from garbage collection, and lowers its frequency, because a
    # request leaves little garbage. Together this saves a tenth of a request's CPU time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    if worker.age == 1:
        from gunicorn.systemd import sd_notify

        from app.server.worker import log_connection_budget

        # Without it, systemd would mistake the end of the old master in a rolling restart for the
        # end of the service. Sent only now, because a master whose workers do not start must not
        # become the service.
        sd_notify(f"MAINPID={worker.ppid}", worker.log)
        threading.Thread(
            target=log_connection_budget, args=(settings, workers), daemon=True
        ).start()


def child_exit(server, worker):  # noqa: ANN001, ARG001
    """Remove the gauges of a worker that has ended. Its counters stay."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.number)


def on_exit(server):  # noqa: ANN001, ARG001
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        shutil.rmtree(folder, ignore_errors=True)

"""gunicorn's settings, each with its reason. What is not here is gunicorn's default.

It listens on 127.0.0.1:8000, or on every address where PORT is set.
"""

import gc
import os
import shutil
import tempfile
import threading

from app import logs
from app.settings import from_environment

# Read in the master too, so that a wrong variable ends the start instead of each worker's.
settings = from_environment()

wsgi_app = "app.main:app"
worker_class = "app.server.Worker"
workers = settings.web_concurrency

# The longest that a worker's event loop may stand still before it is taken for dead: it says each
# second that it is not. It is no limit of a request's time: DATABASE_TIMEOUT is.
timeout = 30

# How long an idle connection is kept. Longer than most clients think between two requests, short
# enough to be waited for when a worker drains.
keepalive = 5

# What a stopping worker has for draining (keepalive) and for its last answers. Orchestrators must
# give more: see stop_grace_period in docker-compose.yml.
graceful_timeout = 30

# The workers' heartbeat is a file: on a disk a slow write would look like a dead worker.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112, S108

# A second way to command the master, which nothing here needs.
control_socket_disable = True

# gunicorn writes its lines in the same format as the app does.
logconfig_dict = logs.configuration(settings.log_level, settings.log_format)

# The files through which all workers' metrics come together. Of this master alone: after a roll the
# new one begins anew, as after any restart.
_own = f"heroes-metrics-{os.getpid()}-"
_metrics = os.environ.get("PROMETHEUS_MULTIPROC_DIR", worker_tmp_dir)
if not os.path.basename(_metrics or "").startswith(_own):  # noqa: PTH119  (read again by HUP)
    _metrics = tempfile.mkdtemp(prefix=_own, dir=_metrics)
os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics


def post_worker_init(worker):  # noqa: ANN001
    """In each worker, after the app is loaded."""
    # What is loaded stays: the garbage collector need not look through it again and again. And it
    # need not look so often, because what a request leaves behind is small. Together they save a
    # tenth of a request's CPU time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    if worker.age == 1:
        from gunicorn.systemd import sd_notify

        from app.server import log_connection_budget

        # In a roll systemd would take the end of the old master for the end of the service. Only
        # now, because a new master whose workers do not start must not become the service.
        sd_notify(f"MAINPID={worker.ppid}", worker.log)
        threading.Thread(
            target=log_connection_budget, args=(settings, workers), daemon=True
        ).start()


def child_exit(server, worker):  # noqa: ANN001, ARG001
    """The gauges of a worker that ended go; what it counted stays."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker.pid)


def on_exit(server):  # noqa: ANN001, ARG001
    shutil.rmtree(_metrics, ignore_errors=True)

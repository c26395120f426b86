# The dependencies, in a virtual environment of their own: what installs them stays in this stage.
FROM python:3.14-slim AS dependencies
WORKDIR /build
RUN python -m venv /venv
COPY requirements.txt .
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement requirements.txt \
    && /venv/bin/pip uninstall --yes pip
# The command `heroes`. The code is not installed, so pip has not made it.
RUN printf '#!/bin/sh\nexec python -m app "$@"\n' > /venv/bin/heroes && chmod +x /venv/bin/heroes

# The service: the environment, the code, and nothing to build with.
FROM python:3.14-slim
COPY --from=dependencies /venv /venv
WORKDIR /srv/heroes
ENV PATH=/venv/bin:$PATH \
    # The code is not installed, and gunicorn reads its configuration before it looks in its folder.
    PYTHONPATH=/srv/heroes \
    # The file system is read-only.
    PYTHONDONTWRITEBYTECODE=1 \
    # Where PORT is set, gunicorn listens on every address of the container.
    PORT=8000
# A number, so that an orchestrator can see that it is not root without looking into the image.
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=4s --start-period=20s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/health/ready\", timeout=3)"]
# As the first process and not through a shell, so that a stop reaches it.
CMD ["gunicorn"]
# Last, so that a change of the code makes only these small layers again.
COPY alembic.ini gunicorn.conf.py ./
COPY alembic alembic
COPY app app

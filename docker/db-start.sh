#!/bin/bash
# Start PostgreSQL. If the first start was interrupted, remove its incomplete data directory first:
# the image would take it for a complete one.
set -euo pipefail

# Exists while the image initializes the data directory: see db-initialized.sh. Until then only
# scripts can connect to the server, so the directory contains no data.
marker=/var/lib/postgresql/initializing

if [[ -e $marker ]]; then
    echo "The first start was interrupted. Removing $PGDATA and starting again." >&2
    rm -rf "$PGDATA"
elif [[ ! -d $PGDATA || -z $(ls -A "$PGDATA") ]]; then
    touch "$marker"
fi
exec docker-entrypoint.sh "$@"

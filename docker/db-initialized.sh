#!/bin/bash
# Record that the data directory is complete: see db-start.sh. The image runs this script at the end
# of the initialization.
sync --file-system "$PGDATA" && rm /var/lib/postgresql/initializing

#!/bin/sh
# Write the passwords to PgBouncer's userlist and start PgBouncer.
set -eu
umask 077

entry() { # entry ROLE PASSWORD: a quote within a value is doubled.
    printf '"%s" "%s"\n' "$1" "$(printf %s "$2" | sed 's/"/""/g')"
}

entry heroes_app "$APP_PASSWORD" >/tmp/userlist.txt
entry heroes_owner "$OWNER_PASSWORD" >>/tmp/userlist.txt
exec pgbouncer /etc/pgbouncer/pgbouncer.ini

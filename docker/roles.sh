#!/bin/bash
# Create the roles and set their passwords. `docker compose up` runs this each time, before the
# migrations.
#
# heroes_owner owns the schema, for migrations. heroes_app is the service: it may read and write
# rows, and nothing else.
set -euo pipefail

for variable in POSTGRES_PASSWORD OWNER_PASSWORD APP_PASSWORD; do
    if [[ ! ${!variable:-} =~ [^[:space:]] ]]; then
        echo "$variable is empty; set it in .env, in single quotes, or remove its line for the default." >&2
        exit 1
    fi
done

# PostgreSQL trusts connections from its own container's network, so a new POSTGRES_PASSWORD works.
psql --set ON_ERROR_STOP=1 --no-psqlrc --quiet --single-transaction \
    --host "${PGHOST:-127.0.0.1}" --username postgres --dbname heroes <<'SQL'
SET client_min_messages = warning;
-- \getenv, because arguments are visible in the list of processes.
\getenv postgres_password POSTGRES_PASSWORD
\getenv owner_password OWNER_PASSWORD
\getenv app_password APP_PASSWORD

SELECT format('CREATE ROLE %I LOGIN', name)
FROM unnest(ARRAY['heroes_owner', 'heroes_app']) AS name
WHERE name NOT IN (SELECT rolname FROM pg_roles) \gexec
ALTER ROLE postgres PASSWORD :'postgres_password';
ALTER ROLE heroes_owner PASSWORD :'owner_password';
ALTER ROLE heroes_app PASSWORD :'app_password';

-- Only if a pooler does not pass on the timeouts that the service sends. The shares are the service's.
\getenv seconds ROLE_TIMEOUT
\if :{?seconds}
    SELECT format('ALTER ROLE heroes_app SET %I = %L', name, ceil(:'seconds' * share * 1000) || 'ms')
    FROM (VALUES ('lock_timeout', 0.5), ('statement_timeout', 0.9),
                 ('idle_in_transaction_session_timeout', 1)) AS timeouts (name, share) \gexec
\else
    ALTER ROLE heroes_app RESET lock_timeout;
    ALTER ROLE heroes_app RESET statement_timeout;
    ALTER ROLE heroes_app RESET idle_in_transaction_session_timeout;
\endif

REVOKE ALL ON DATABASE :DBNAME FROM PUBLIC;
GRANT CONNECT ON DATABASE :DBNAME TO heroes_owner, heroes_app;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
ALTER SCHEMA public OWNER TO heroes_owner;
GRANT USAGE ON SCHEMA public TO heroes_app;

SET ROLE heroes_owner;
-- Alembic's own table, before the privileges below: the service reads its revision and never writes it.
CREATE TABLE IF NOT EXISTS alembic_version (
    version_num varchar(32) NOT NULL CONSTRAINT alembic_version_pkc PRIMARY KEY
);
GRANT SELECT ON alembic_version TO heroes_app;
-- Of every table that a migration makes from now on.
ALTER DEFAULT PRIVILEGES IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO heroes_app;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE ON SEQUENCES TO heroes_app;
SQL

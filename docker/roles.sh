#!/bin/bash
# Run once by the postgres image, as the superuser, when the data directory is new.
#
# heroes_owner owns the schema, for migrations. heroes_app is the service: it may read and write
# rows, and nothing else.
set -euo pipefail

psql --set ON_ERROR_STOP=1 --no-psqlrc --username "${POSTGRES_USER:-postgres}" --dbname "$POSTGRES_DB" \
    --set owner_password="$OWNER_PASSWORD" --set app_password="$APP_PASSWORD" <<'SQL'
CREATE ROLE heroes_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE heroes_app LOGIN PASSWORD :'app_password';

REVOKE ALL ON DATABASE :DBNAME FROM PUBLIC;
GRANT CONNECT ON DATABASE :DBNAME TO heroes_owner, heroes_app;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
ALTER SCHEMA public OWNER TO heroes_owner;
GRANT USAGE ON SCHEMA public TO heroes_app;

SET ROLE heroes_owner;
-- Alembic's own table, before the privileges below: the service reads its revision and never writes it.
CREATE TABLE alembic_version (
    version_num varchar(32) NOT NULL CONSTRAINT alembic_version_pkc PRIMARY KEY
);
GRANT SELECT ON alembic_version TO heroes_app;
-- Of every table that a migration makes from now on.
ALTER DEFAULT PRIVILEGES IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO heroes_app;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE ON SEQUENCES TO heroes_app;
SQL

-- Named statements that prepare a database: migrations and, where there is TimescaleDB, the hypertable.

-- name: no_timeout
SET LOCAL statement_timeout = 0;

-- name: lock_schema
SELECT pg_advisory_xact_lock(7264, 1);

-- name: has_migration_table
SELECT to_regclass('schema_migration') IS NOT NULL;

-- name: make_migration_table
CREATE TABLE IF NOT EXISTS schema_migration (
    version    int4 PRIMARY KEY,
    name       text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- name: newest_migration
SELECT coalesce(max(version), 0) FROM schema_migration;

-- name: enter_migration
INSERT INTO schema_migration (version, name) VALUES ($1, $2);

-- name: timescale_available
SELECT installed_version IS NOT NULL AS installed FROM pg_available_extensions WHERE name = 'timescaledb';

-- name: create_timescale
CREATE EXTENSION timescaledb;

-- name: timescale_version
SELECT extversion FROM pg_extension WHERE extname = 'timescaledb';

-- name: make_hypertable
SELECT create_hypertable('reading', 'time', chunk_time_interval => $1::interval,
                         create_default_indexes => false, if_not_exists => true, migrate_data => true);

-- name: is_hypertable
SELECT EXISTS (SELECT FROM timescaledb_information.hypertables
               WHERE hypertable_schema = current_schema() AND hypertable_name = 'reading');

-- name: make_rollup_hypertable
SELECT create_hypertable('rollup', 'time', chunk_time_interval => interval '7 days',
                         create_default_indexes => false, if_not_exists => true, migrate_data => true);

-- name: is_rollup_hypertable
SELECT EXISTS (SELECT FROM timescaledb_information.hypertables
               WHERE hypertable_schema = current_schema() AND hypertable_name = 'rollup');

-- name: enable_rollup_compression
ALTER TABLE rollup SET (timescaledb.compress, timescaledb.compress_segmentby = 'series_no, window_s, gateway_no',
                        timescaledb.compress_orderby = 'time');

-- name: enable_compression
ALTER TABLE reading SET (timescaledb.compress, timescaledb.compress_segmentby = 'series_no',
                         timescaledb.compress_orderby = 'time');

-- name: policies
SELECT proc_name, coalesce(config ->> 'compress_after', config ->> 'drop_after')::interval AS after
FROM timescaledb_information.jobs
WHERE hypertable_schema = current_schema() AND hypertable_name = 'reading'
  AND proc_name IN ('policy_compression', 'policy_retention');

-- name: add_policy_compression
SELECT add_compression_policy('reading', $1::interval);

-- name: remove_policy_compression
SELECT remove_compression_policy('reading', true);

-- name: add_policy_retention
SELECT add_retention_policy('reading', $1::interval);

-- name: remove_policy_retention
SELECT remove_retention_policy('reading', true);

-- Named statements of the regional tier. Each runs on one line of `-- name:`.

-- name: lock_gateway
SELECT pg_advisory_xact_lock(hashtextextended($1, 7265));

-- name: newest_range_up_to
-- Ranges do not overlap, so the one that starts last at or before $4 is the only one that can reach into it.
SELECT first_commit, last_commit, parts
FROM ingest_ledger
WHERE gateway_id = $1 AND epoch = $2 AND class = $3 AND first_commit <= $4
ORDER BY first_commit DESC
LIMIT 1;

-- name: entries_reaching_into_part
-- Part k of n is the stretch from (k - 1) / n to k / n of its range.
SELECT part, parts, rows, stored, duplicates, conflicts, refused, min_time_us, max_time_us
FROM ingest_ledger
WHERE gateway_id = $1 AND epoch = $2 AND class = $3 AND first_commit = $4
  AND part::int8 * $6::int4 > ($5::int4 - 1)::int8 * parts
  AND (part - 1)::int8 * $6::int4 < $5::int4::int8 * parts;

-- name: enter_range
WITH seen AS (
    INSERT INTO gateway (gateway_id) VALUES ($1)
    ON CONFLICT (gateway_id) DO UPDATE SET last_seen = now()
)
INSERT INTO ingest_ledger (gateway_id, epoch, class, first_commit, last_commit, part, parts, rows, stored,
                           duplicates, conflicts, refused, min_time_us, max_time_us)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14);

-- name: gateways_seen
SELECT gateway_id, first_seen, last_seen FROM gateway
WHERE $1::text IS NULL OR gateway_id = $1
ORDER BY gateway_id;

-- name: applied_ranges
-- Adjacent complete ranges as one: a new island starts where the one before does not end at first_commit - 1.
-- A range in parts is complete when their shares add up to 1; any two shares differ by far more than 1e-11.
WITH whole AS (
    SELECT gateway_id, epoch, class, first_commit, max(last_commit) AS last_commit, sum(rows) AS rows,
           sum(stored) AS stored, sum(duplicates) AS duplicates, sum(conflicts) AS conflicts,
           sum(refused) AS refused, sum(1::numeric / parts) AS share
    FROM ingest_ledger
    WHERE ($1::text IS NULL OR gateway_id = $1) AND ($2::uuid IS NULL OR epoch = $2)
    GROUP BY gateway_id, epoch, class, first_commit
), marked AS (
    SELECT *, least(share, 1) > 0.99999999999 AS complete,
           share < 0.99999999999 OR lag(share) OVER w < 0.99999999999
               OR first_commit <> lag(last_commit) OVER w + 1 AS starts
    FROM whole
    WINDOW w AS (PARTITION BY gateway_id, epoch, class ORDER BY first_commit)
), islands AS (
    SELECT *, count(*) FILTER (WHERE starts)
                  OVER (PARTITION BY gateway_id, epoch, class ORDER BY first_commit) AS island
    FROM marked
)
SELECT gateway_id, epoch, class, min(first_commit) AS first_commit, max(last_commit) AS last_commit,
       bool_and(complete) AS complete, sum(rows)::int8 AS rows, sum(stored)::int8 AS stored,
       sum(duplicates)::int8 AS duplicates, sum(conflicts)::int8 AS conflicts, sum(refused)::int8 AS refused
FROM islands
GROUP BY gateway_id, epoch, class, island
ORDER BY gateway_id, epoch, class, min(first_commit);

-- name: declared_losses
SELECT gateway_id, epoch, class, first_commit, last_commit, rows, reason, survives, declared_at, from_time, to_time
FROM declared_loss
WHERE ($1::text IS NULL OR gateway_id = $1) AND ($2::uuid IS NULL OR epoch = $2)
ORDER BY gateway_id, epoch, class, first_commit;

-- name: gateways_to_merge
SELECT DISTINCT gateway_id
FROM ingest_ledger
WHERE applied_at < now() - $1::interval
GROUP BY gateway_id, epoch, class
HAVING count(*) > 1
ORDER BY gateway_id;

-- name: merge_ledger
-- Old entries that lie side by side become one. A range in parts is merged once all of them are old.
WITH whole AS (
    SELECT epoch, class, first_commit, max(last_commit) AS last_commit
    FROM ingest_ledger
    WHERE gateway_id = $1
    GROUP BY epoch, class, first_commit
    HAVING max(applied_at) < now() - $2::interval AND sum(1::numeric / parts) > 0.99999999999
), marked AS (
    SELECT *, first_commit <> lag(last_commit) OVER (PARTITION BY epoch, class ORDER BY first_commit) + 1
                  AS starts
    FROM whole
), islands AS (
    SELECT *, count(*) FILTER (WHERE starts) OVER (PARTITION BY epoch, class ORDER BY first_commit) AS island
    FROM marked
), old AS (
    DELETE FROM ingest_ledger l USING islands i
    WHERE l.gateway_id = $1 AND l.epoch = i.epoch AND l.class = i.class AND l.first_commit = i.first_commit
    RETURNING l.*, i.island
)
INSERT INTO ingest_ledger (gateway_id, epoch, class, first_commit, last_commit, rows, stored, duplicates,
                           conflicts, refused, min_time_us, max_time_us, applied_at, batches, part, parts)
SELECT $1, epoch, class, min(first_commit), max(last_commit), sum(rows), sum(stored), sum(duplicates),
       sum(conflicts), sum(refused), min(min_time_us), max(max_time_us), max(applied_at), sum(batches), 1, 1
FROM old
GROUP BY epoch, class, island;

-- name: add_sensors
INSERT INTO sensor (sensor_id)
SELECT DISTINCT n.sensor_id
FROM unnest($1::text[]) AS n (sensor_id)
WHERE NOT EXISTS (SELECT FROM sensor d WHERE d.sensor_id = n.sensor_id)
ORDER BY n.sensor_id
ON CONFLICT (sensor_id) DO NOTHING;

-- name: add_series
INSERT INTO series (sensor_no, sensor_type)
SELECT DISTINCT d.sensor_no, n.sensor_type
FROM unnest($1::text[], $2::text[]) AS n (sensor_id, sensor_type)
JOIN sensor d USING (sensor_id)
WHERE NOT EXISTS (SELECT FROM series s WHERE s.sensor_no = d.sensor_no AND s.sensor_type = n.sensor_type)
ORDER BY d.sensor_no, n.sensor_type
ON CONFLICT (sensor_no, sensor_type) DO NOTHING;

-- name: find_series
SELECT d.sensor_id, s.sensor_type, s.series_no, s.sensor_no
FROM unnest($1::text[], $2::text[]) AS n (sensor_id, sensor_type)
JOIN sensor d USING (sensor_id)
JOIN series s ON s.sensor_no = d.sensor_no AND s.sensor_type = n.sensor_type;

-- name: update_sensors
UPDATE sensor d
SET location = coalesce(n.location, d.location),
    manufacturer = coalesce(n.manufacturer, d.manufacturer),
    firmware_version = coalesce(n.firmware_version, d.firmware_version),
    boot_id = coalesce(n.boot_id, d.boot_id),
    attributes_at_us = n.at_us
FROM unnest($1::int4[], $2::int8[], $3::text[], $4::text[], $5::text[], $6::text[])
     AS n (sensor_no, at_us, location, manufacturer, firmware_version, boot_id)
WHERE d.sensor_no = n.sensor_no AND d.attributes_at_us < n.at_us;

-- name: update_series
UPDATE series s
SET unit = n.unit, attributes_at_us = n.at_us
FROM unnest($1::int4[], $2::int8[], $3::text[]) AS n (series_no, at_us, unit)
WHERE s.series_no = n.series_no AND s.attributes_at_us < n.at_us;

-- name: make_staging
CREATE TEMPORARY TABLE reading_staging (
    series_no int4, time timestamptz, value float8, quality float4, battery_level float4,
    signal_strength float4, seq int8, flags int4, ordinal int4
) ON COMMIT DROP;

-- name: insert_staged
INSERT INTO reading (series_no, time, value, quality, battery_level, signal_strength, seq, flags)
SELECT DISTINCT ON (series_no, time)
       series_no, time, value, quality, battery_level, signal_strength, seq, flags
FROM reading_staging
ORDER BY series_no, time, ordinal
ON CONFLICT DO NOTHING;

-- name: note_conflicts
-- The bounds of time let TimescaleDB leave out the chunks that cannot hold a match.
INSERT INTO reading_conflict (series_no, time, value, stored_value, quality, battery_level, signal_strength,
                              seq, flags, gateway_id, epoch, first_commit)
SELECT g.series_no, g.time, g.value, r.value, g.quality, g.battery_level, g.signal_strength,
       g.seq, g.flags, $1, $2, $3
FROM reading_staging g
JOIN reading r ON r.series_no = g.series_no AND r.time = g.time
WHERE r.value <> g.value
  AND r.time >= (SELECT min(time) FROM reading_staging)
  AND r.time <= (SELECT max(time) FROM reading_staging);

-- name: count_staged_in_reading
-- How many staged rows are there by series and time, and how many of those with another value.
SELECT count(*) AS present, count(*) FILTER (WHERE r.value <> g.value) AS conflicts
FROM reading_staging g
JOIN reading r ON r.series_no = g.series_no AND r.time = g.time
WHERE r.time >= (SELECT min(time) FROM reading_staging)
  AND r.time <= (SELECT max(time) FROM reading_staging);

-- name: lock_key
SELECT pg_advisory_xact_lock(hashtextextended($1 || chr(10) || $2, 7266));

-- name: earlier_answer
SELECT body_hash, answer FROM idempotency
WHERE client = $1 AND key = $2 AND made_at > now() - $3::interval;

-- name: keep_answer
INSERT INTO idempotency (client, key, body_hash, answer) VALUES ($1, $2, $3, $4)
ON CONFLICT (client, key) DO UPDATE
SET body_hash = excluded.body_hash, answer = excluded.answer, made_at = excluded.made_at;

-- name: forget_answers
DELETE FROM idempotency WHERE made_at < now() - $1::interval;

-- name: lock_file
SELECT pg_advisory_xact_lock(hashtextextended(encode($1, 'hex'), 7267));

-- name: loaded_file
SELECT lines, stored, duplicates, conflicts, rejected, complete FROM loaded_file WHERE sha256 = $1;

-- name: enter_loaded
INSERT INTO loaded_file AS f (sha256, name, lines, stored, duplicates, conflicts, rejected, complete)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
ON CONFLICT (sha256) DO UPDATE
SET lines = excluded.lines, stored = excluded.stored, duplicates = excluded.duplicates,
    conflicts = excluded.conflicts, rejected = excluded.rejected, complete = excluded.complete,
    loaded_at = now();

-- name: compressed_chunks
SELECT format('%I.%I', c.chunk_schema, c.chunk_name) AS name,
       (extract(epoch FROM c.range_start) * 1000000)::int8 AS start_us,
       (extract(epoch FROM c.range_end) * 1000000)::int8 AS end_us,
       coalesce(s.numrows_pre_compression, 0)::int8 AS rows
FROM timescaledb_information.chunks c
JOIN _timescaledb_catalog.chunk k ON k.schema_name = c.chunk_schema AND k.table_name = c.chunk_name
LEFT JOIN _timescaledb_catalog.compression_chunk_size s ON s.chunk_id = k.id
WHERE c.hypertable_schema = current_schema() AND c.hypertable_name = 'reading' AND c.is_compressed;

-- name: no_timeout
SET LOCAL statement_timeout = 0;

-- name: open_chunk
SELECT open_chunk($1::text::regclass);

-- name: drop_staging
DROP TABLE reading_staging;

-- name: gateway_no
WITH new AS (
    INSERT INTO gateway (gateway_id) VALUES ($1) ON CONFLICT (gateway_id) DO NOTHING RETURNING gateway_no
)
SELECT gateway_no FROM new UNION ALL SELECT gateway_no FROM gateway WHERE gateway_id = $1 LIMIT 1;

-- name: make_rollup_staging
CREATE TEMPORARY TABLE rollup_staging (
    series_no int4, window_s int4, time timestamptz, revision int4, count int4, mean float8, m2 float8,
    minimum float8, maximum float8, first float8, first_at timestamptz, last float8, last_at timestamptz,
    flagged int4, excluded int4, suppressed int4
) ON COMMIT DROP;

-- name: store_rollups
INSERT INTO rollup AS r (series_no, window_s, time, gateway_no, revision, count, mean, m2, minimum, maximum, first,
                         first_at, last, last_at, flagged, excluded, suppressed)
SELECT DISTINCT ON (series_no, window_s, time)
       series_no, window_s, time, $1::int4, revision, count, mean, m2, minimum, maximum, first, first_at, last,
       last_at, flagged, excluded, suppressed
FROM rollup_staging
ORDER BY series_no, window_s, time, revision DESC
ON CONFLICT (series_no, window_s, time, gateway_no) DO UPDATE
SET revision = excluded.revision, count = excluded.count, mean = excluded.mean, m2 = excluded.m2,
    minimum = excluded.minimum, maximum = excluded.maximum, first = excluded.first,
    first_at = excluded.first_at, last = excluded.last, last_at = excluded.last_at,
    flagged = excluded.flagged, excluded = excluded.excluded, suppressed = excluded.suppressed
WHERE r.revision < excluded.revision;

-- name: drop_rollup_staging
DROP TABLE rollup_staging;

-- name: store_alerts
INSERT INTO alert (series_no, rule, time, state, severity, value, threshold, count, detail, gateway_no)
SELECT n.series_no, n.rule, n.time, n.state, n.severity, n.value, n.threshold, n.count, n.detail, $1::int4
FROM unnest($2::int4[], $3::text[], $4::timestamptz[], $5::int2[], $6::int2[], $7::float8[], $8::float8[],
            $9::int4[], $10::text[])
     AS n (series_no, rule, time, state, severity, value, threshold, count, detail)
ON CONFLICT DO NOTHING;

-- name: store_declarations
INSERT INTO declared_loss (gateway_id, epoch, class, first_commit, last_commit, rows, reason, survives, declared_at,
                           from_time, to_time)
SELECT $1::text, $2::uuid, n.class, n.first_commit, n.last_commit, n.rows, n.reason, n.survives, n.declared_at,
       n.from_time, n.to_time
FROM unnest($3::int2[], $4::int8[], $5::int8[], $6::int8[], $7::text[], $8::text[], $9::timestamptz[],
            $10::timestamptz[], $11::timestamptz[])
     AS n (class, first_commit, last_commit, rows, reason, survives, declared_at, from_time, to_time)
ON CONFLICT DO NOTHING;

-- name: forget_rollups
DELETE FROM rollup WHERE window_s = $1 AND time < now() - $2::interval;

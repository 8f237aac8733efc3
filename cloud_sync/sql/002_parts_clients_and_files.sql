-- Ranges that travel in parts, with rows refused, and merged when they are old; declared losses; what clients
-- that are no gateways have been answered; which files have been loaded.

ALTER TABLE ingest_ledger
    ALTER COLUMN rows TYPE int8,
    ALTER COLUMN stored TYPE int8,
    ALTER COLUMN duplicates TYPE int8,
    ALTER COLUMN conflicts TYPE int8,
    ALTER COLUMN min_time_us DROP NOT NULL,  -- no row is left when all were refused
    ALTER COLUMN max_time_us DROP NOT NULL,
    ADD COLUMN part int4 NOT NULL DEFAULT 1,
    ADD COLUMN parts int4 NOT NULL DEFAULT 1,
    ADD COLUMN refused int8 NOT NULL DEFAULT 0,
    ADD COLUMN batches int4 NOT NULL DEFAULT 1,  -- more than 1: merged, what each of them held is not known
    ADD CHECK (0 < part AND part <= parts),
    DROP CONSTRAINT ingest_ledger_pkey,
    ADD PRIMARY KEY (gateway_id, epoch, class, first_commit, parts, part);

-- What a gateway gave up, in its own words.
CREATE TABLE declared_loss (
    gateway_id   text        NOT NULL,
    epoch        uuid        NOT NULL,
    class        int2        NOT NULL,
    first_commit int8        NOT NULL,
    last_commit  int8        NOT NULL,
    rows         int8        NOT NULL,
    reason       text        NOT NULL,
    survives     text        NOT NULL DEFAULT '',  -- the coarser form that is left, e.g. rollup 60 s
    declared_at  timestamptz NOT NULL,
    noted_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (gateway_id, epoch, class, first_commit, last_commit, reason)
);

-- A conflict may come from a client or a file, which have no epoch and no commits.
ALTER TABLE reading_conflict
    ALTER COLUMN epoch DROP NOT NULL,
    ALTER COLUMN first_commit DROP NOT NULL;

-- Answers to requests that named an Idempotency-Key, kept for a day.
CREATE TABLE idempotency (
    client    text        NOT NULL,
    key       text        NOT NULL,
    body_hash bytea       NOT NULL,
    answer    text        NOT NULL,
    made_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (client, key)
);
CREATE INDEX idempotency_made_at ON idempotency (made_at);

-- Files of a file destination, by their contents.
CREATE TABLE loaded_file (
    sha256     bytea       PRIMARY KEY,
    name       text        NOT NULL,
    lines      int8        NOT NULL DEFAULT 0,
    stored     int8        NOT NULL DEFAULT 0,
    duplicates int8        NOT NULL DEFAULT 0,
    conflicts  int8        NOT NULL DEFAULT 0,
    rejected   int8        NOT NULL DEFAULT 0,
    complete   boolean     NOT NULL DEFAULT false,
    loaded_at  timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

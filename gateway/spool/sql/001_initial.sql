-- The spool, format version 1. docs/spool-format.md describes it for people.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value NOT NULL
) WITHOUT ROWID;

-- One row a series and state of its attributes; segments name series by series_no.
CREATE TABLE series (
    series_no   INTEGER PRIMARY KEY,
    sensor_id   TEXT NOT NULL,
    sensor_type TEXT NOT NULL,
    attributes  TEXT NOT NULL,  -- JSON object of texts, keys sorted
    UNIQUE (sensor_id, sensor_type, attributes)
);

-- position = record class << 56 | first_commit, so that one b-tree holds every class in commit order
-- and a commit touches as few pages as can be.
CREATE TABLE segment (
    position      INTEGER PRIMARY KEY,
    last_commit   INTEGER NOT NULL,
    rows          INTEGER NOT NULL,
    rows_before   INTEGER NOT NULL,  -- rows of its class ever committed before it
    min_time_us   INTEGER NOT NULL,
    max_time_us   INTEGER NOT NULL,
    written_at_us INTEGER NOT NULL,
    block         BLOB NOT NULL
);

CREATE TABLE destination (
    name       TEXT PRIMARY KEY,
    kind       TEXT NOT NULL,
    added_at_us INTEGER NOT NULL
) WITHOUT ROWID;

-- Ranges of commits a destination has given a receipt for, merged.
CREATE TABLE delivered (
    destination  TEXT NOT NULL,
    class        INTEGER NOT NULL,
    first_commit INTEGER NOT NULL,
    last_commit  INTEGER NOT NULL,
    PRIMARY KEY (destination, class, first_commit)
) WITHOUT ROWID;

-- Ranges fixed for sending and not yet settled.
CREATE TABLE batch (
    destination   TEXT NOT NULL,
    class         INTEGER NOT NULL,
    first_commit  INTEGER NOT NULL,
    last_commit   INTEGER NOT NULL,
    claimed_at_us INTEGER NOT NULL,
    PRIMARY KEY (destination, class, first_commit)
) WITHOUT ROWID;

CREATE TABLE quarantine (
    quarantine_no  INTEGER PRIMARY KEY,
    received_at_us INTEGER NOT NULL,
    source         TEXT NOT NULL,     -- listen, subscribe, host, http, or a destination's name
    topic          TEXT NOT NULL,
    reason         TEXT NOT NULL,     -- machine-readable
    detail         TEXT NOT NULL,     -- for a person
    payload        BLOB NOT NULL,     -- the first bytes
    payload_bytes  INTEGER NOT NULL   -- how many there were
);

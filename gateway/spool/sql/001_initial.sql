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
    indexed       INTEGER NOT NULL,  -- 0: fresh from a group commit, 1: compaction has been over it
    block         BLOB NOT NULL
);

-- Which segments may hold a time, for the exact check of late readings. Fresh segments are the newest few,
-- known in memory, so that a group commit does not touch this index.
CREATE INDEX segment_times ON segment (min_time_us, max_time_us) WHERE indexed = 1;

-- The newest time of each series in indexed segments; series_no is that of its first attribute state.
CREATE TABLE series_mark (
    series_no INTEGER PRIMARY KEY,
    newest_us INTEGER NOT NULL
);

-- Segments whose bytes could not be read, set aside so that everything else goes on.
CREATE TABLE damaged (
    position       INTEGER PRIMARY KEY,
    last_commit    INTEGER NOT NULL,
    rows           INTEGER NOT NULL,
    set_aside_at_us INTEGER NOT NULL,
    reason         TEXT NOT NULL,
    block          BLOB,
    min_time_us    INTEGER NOT NULL,
    max_time_us    INTEGER NOT NULL,
    lacking        TEXT NOT NULL  -- JSON array: destinations that did not have it, until that is declared
);

-- What left the spool before a destination had it; '' stands for the destination of a gateway without any.
-- Losses that follow one another for one reason are one row.
CREATE TABLE loss (
    destination    TEXT NOT NULL,
    class          INTEGER NOT NULL,
    first_commit   INTEGER NOT NULL,
    last_commit    INTEGER NOT NULL,
    rows           INTEGER NOT NULL,
    from_us        INTEGER NOT NULL,
    to_us          INTEGER NOT NULL,
    reason         TEXT NOT NULL,
    survives       TEXT NOT NULL,  -- the coarser form that is left, '' for none
    declared_at_us INTEGER NOT NULL,
    PRIMARY KEY (destination, class, first_commit)
) WITHOUT ROWID;

CREATE TABLE destination (
    name       TEXT PRIMARY KEY,
    kind       TEXT NOT NULL,
    added_at_us INTEGER NOT NULL
) WITHOUT ROWID;

-- Ranges of commits that need not be sent any more, merged: a receipt came for them, or they were there before
-- the moment from which the destination was to have everything.
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

-- Parts of an open batch that are still to be delivered; one without any travels whole. Part k of n holds the
-- rows (k-1)*r/n .. k*r/n of the batch's r rows in canonical order; refused are positions among the r.
CREATE TABLE part (
    destination  TEXT NOT NULL,
    class        INTEGER NOT NULL,
    first_commit INTEGER NOT NULL,
    part         INTEGER NOT NULL,
    parts        INTEGER NOT NULL,
    refused      TEXT NOT NULL,  -- JSON array: rows that the destination refused, left out and in quarantine
    PRIMARY KEY (destination, class, first_commit, parts, part)
) WITHOUT ROWID;

-- What other gateways have delivered here: an entry a batch, old ones that lie side by side merged. Their times
-- are null where every row was refused.
CREATE TABLE received (
    gateway_id   TEXT NOT NULL,
    epoch        BLOB NOT NULL,  -- 16 bytes
    class        INTEGER NOT NULL,
    first_commit INTEGER NOT NULL,
    parts        INTEGER NOT NULL,
    part         INTEGER NOT NULL,
    last_commit  INTEGER NOT NULL,
    rows         INTEGER NOT NULL,
    stored       INTEGER NOT NULL,
    duplicates   INTEGER NOT NULL,
    conflicts    INTEGER NOT NULL,
    refused      INTEGER NOT NULL,
    min_time_us  INTEGER,
    max_time_us  INTEGER,
    first_at_us  INTEGER NOT NULL,  -- when it came; the earliest and the latest of merged ones
    last_at_us   INTEGER NOT NULL,
    PRIMARY KEY (gateway_id, epoch, class, first_commit, parts, part)
) WITHOUT ROWID;

-- What a client was answered to a request with an Idempotency-Key.
CREATE TABLE answered (
    client         TEXT NOT NULL,
    key            TEXT NOT NULL,
    body_hash      BLOB NOT NULL,
    answer         TEXT NOT NULL,
    answered_at_us INTEGER NOT NULL,
    PRIMARY KEY (client, key)
) WITHOUT ROWID;

-- What processing has to remember, written in one transaction with what it has made of the readings: how far it
-- has come ('follower/progress', a commit of readings, as text), and the state of each stage under its name.
CREATE TABLE processing_state (
    key   TEXT PRIMARY KEY,
    value BLOB NOT NULL
);

-- Readings that the gateway stamped while it did not know the time, one row a group, until they are committed with
-- their true times. A stamp less base_us is the time since that boot.
CREATE TABLE parked (
    parked_no     INTEGER PRIMARY KEY AUTOINCREMENT,
    boot_id       TEXT NOT NULL,
    base_us       INTEGER NOT NULL,
    since_boot_us INTEGER NOT NULL,  -- when it was parked
    rows          INTEGER NOT NULL,
    block         BLOB NOT NULL
);

-- What people are still to be told of alerts, by channel.
CREATE TABLE outbox (
    outbox_no    INTEGER PRIMARY KEY AUTOINCREMENT,
    channel      TEXT NOT NULL,
    queued_at_us INTEGER NOT NULL,
    notice       BLOB NOT NULL  -- JSON: AlertNotice in gateway/spool/processing_state.py
);

CREATE TABLE quarantine (
    quarantine_no  INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at_us INTEGER NOT NULL,
    source         TEXT NOT NULL,     -- listen, subscribe, host, http, or a destination's name
    topic          TEXT NOT NULL,
    reason         TEXT NOT NULL,     -- machine-readable
    detail         TEXT NOT NULL,     -- for a person
    payload        BLOB NOT NULL,     -- the first bytes
    payload_bytes  INTEGER NOT NULL   -- how many there were
);

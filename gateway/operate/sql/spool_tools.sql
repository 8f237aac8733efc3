-- What the spool tools ask besides the statements of gateway/spool/sql.

-- name: strange_positions
SELECT position FROM segment WHERE position NOT BETWEEN ? AND ? ORDER BY position LIMIT 100;

-- name: scan
SELECT count(*), coalesce(sum(rows), 0), min(min_time_us), max(max_time_us), coalesce(sum(length(block)), 0)
FROM segment WHERE position BETWEEN ? AND ?;

-- name: covering
SELECT position, last_commit, rows, min_time_us, max_time_us, length(block) FROM segment
WHERE position BETWEEN ? AND ? ORDER BY position DESC LIMIT 1;

-- name: series_count
SELECT count(*) FROM series;

-- name: quarantine_count
SELECT count(*) FROM quarantine;

-- name: all_delivered
SELECT destination, class, first_commit, last_commit FROM delivered ORDER BY destination, class, first_commit;

-- name: all_batches
SELECT destination, class, first_commit, last_commit FROM batch ORDER BY destination, class, first_commit;

-- name: damaged_between
SELECT position, last_commit, rows FROM damaged WHERE position BETWEEN ? AND ? ORDER BY position;

-- name: quarantine_items
SELECT quarantine_no, received_at_us, source, topic, reason, detail, payload, payload_bytes FROM quarantine
WHERE quarantine_no <= ? AND (? IS NULL OR reason = ?) ORDER BY quarantine_no DESC LIMIT ?;

-- name: quarantine_item
SELECT quarantine_no, received_at_us, source, topic, reason, detail, payload, payload_bytes FROM quarantine
WHERE quarantine_no = ?;

-- name: quarantine_numbers
SELECT quarantine_no FROM quarantine WHERE ? IS NULL OR reason = ? ORDER BY quarantine_no;

-- name: drop_quarantine
DELETE FROM quarantine WHERE quarantine_no = ?;

-- name: overlong_quarantine
SELECT quarantine_no FROM quarantine WHERE length(payload) > payload_bytes ORDER BY quarantine_no LIMIT 100;

-- name: quarantine_ever
SELECT seq FROM sqlite_sequence WHERE name = 'quarantine';

-- name: meta
SELECT value FROM meta WHERE key = ?;

-- name: set_meta
INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value;

-- name: all_series
SELECT series_no, sensor_id, sensor_type, attributes FROM series ORDER BY series_no;

-- name: add_series
INSERT INTO series (series_no, sensor_id, sensor_type, attributes) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING;

-- name: newest_segment
SELECT position, last_commit, rows, rows_before FROM segment WHERE position BETWEEN ? AND ?
ORDER BY position DESC LIMIT 1;

-- name: append_segment
INSERT INTO segment (position, last_commit, rows, rows_before, min_time_us, max_time_us, written_at_us, indexed, block)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: segment_sizes_from
SELECT position, last_commit, rows FROM segment WHERE position BETWEEN ? AND ? ORDER BY position LIMIT ?;

-- name: blocks_between
SELECT position, block FROM segment WHERE position BETWEEN ? AND ? ORDER BY position;

-- name: block_at
SELECT block FROM segment WHERE position = ?;

-- name: newest_indexed
SELECT position FROM segment WHERE position BETWEEN ? AND ? AND indexed = 1 ORDER BY position DESC LIMIT 1;

-- name: segments_between
SELECT position, last_commit, rows, rows_before, min_time_us, max_time_us, written_at_us FROM segment
WHERE position BETWEEN ? AND ? ORDER BY position LIMIT ?;

-- name: segments_back_from
SELECT position, last_commit, rows, rows_before, min_time_us, max_time_us, written_at_us FROM segment
WHERE position BETWEEN ? AND ? ORDER BY position DESC LIMIT ?;

-- name: mark_indexed
UPDATE segment SET indexed = 1 WHERE position = ?;

-- name: delete_segment
DELETE FROM segment WHERE position = ?;

-- name: marks
SELECT series_no, newest_us FROM series_mark;

-- name: raise_mark
INSERT INTO series_mark (series_no, newest_us) VALUES (?, ?)
ON CONFLICT (series_no) DO UPDATE SET newest_us = max(newest_us, excluded.newest_us);

-- name: set_aside
INSERT INTO damaged (position, last_commit, rows, set_aside_at_us, reason, min_time_us, max_time_us, lacking)
SELECT position, last_commit, rows, ?, ?, min_time_us, max_time_us, ? FROM segment WHERE position = ?;

-- name: damage_to_declare
SELECT position, last_commit, rows, min_time_us, max_time_us, lacking FROM damaged WHERE lacking <> '[]';

-- name: damage_declared
UPDATE damaged SET lacking = '[]' WHERE position = ?;

-- name: grow_loss
UPDATE loss SET last_commit = ?, rows = rows + ?, from_us = min(from_us, ?), to_us = max(to_us, ?), declared_at_us = ?
WHERE destination = ? AND class = ? AND last_commit = ? AND reason = ? AND survives = ?;

-- name: add_loss
INSERT INTO loss (destination, class, first_commit, last_commit, rows, from_us, to_us, reason, survives, declared_at_us)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: loss_totals
SELECT destination, class, reason, survives, sum(rows), min(from_us), max(to_us), max(declared_at_us) FROM loss
GROUP BY destination, class, reason, survives ORDER BY destination, class, reason;

-- name: drop_losses_of
DELETE FROM loss WHERE destination = ?;

-- name: segments_with_sizes
SELECT position, last_commit, rows, rows_before, min_time_us, max_time_us, written_at_us, length(block) FROM segment
WHERE position BETWEEN ? AND ? ORDER BY position LIMIT ?;

-- name: keep_damaged_block
UPDATE damaged SET block = (SELECT block FROM segment WHERE segment.position = damaged.position)
WHERE position = ?;

-- name: damaged_totals
SELECT count(*), coalesce(sum(rows), 0) FROM damaged;

-- name: delivered_everywhere
SELECT first_commit, last_commit FROM delivered WHERE class = ?;

-- name: open_everywhere
SELECT first_commit, last_commit FROM batch WHERE class = ?;

-- name: first_segment_from
SELECT position, rows_before, written_at_us, min_time_us FROM segment WHERE position BETWEEN ? AND ?
ORDER BY position LIMIT 1;

-- name: segment_totals
SELECT count(*), coalesce(sum(rows), 0) FROM segment;

-- name: prune_candidates
SELECT position, last_commit, written_at_us FROM segment WHERE position BETWEEN ? AND ?
ORDER BY position LIMIT ?;

-- name: segment_end
SELECT last_commit, rows_before + rows FROM segment WHERE position = ?;

-- name: delete_segments
DELETE FROM segment WHERE position BETWEEN ? AND ?;

-- name: add_destination
INSERT INTO destination (name, kind, added_at_us) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET kind = excluded.kind;

-- name: destinations
SELECT name, kind, added_at_us FROM destination ORDER BY name;

-- name: delivered
SELECT first_commit, last_commit FROM delivered WHERE destination = ? AND class = ? ORDER BY first_commit;

-- name: delivered_touching
SELECT first_commit, last_commit FROM delivered
WHERE destination = ? AND class = ? AND first_commit <= ? AND last_commit >= ?;

-- name: delete_delivered
DELETE FROM delivered WHERE destination = ? AND class = ? AND first_commit = ?;

-- name: add_delivered
INSERT INTO delivered (destination, class, first_commit, last_commit) VALUES (?, ?, ?, ?);

-- name: open_batches
SELECT first_commit, last_commit FROM batch WHERE destination = ? AND class = ? ORDER BY first_commit;

-- name: add_batch
INSERT INTO batch (destination, class, first_commit, last_commit, claimed_at_us) VALUES (?, ?, ?, ?, ?);

-- name: delete_batch
DELETE FROM batch WHERE destination = ? AND class = ? AND first_commit = ? AND last_commit = ?;

-- name: parts
SELECT part, parts, refused FROM part WHERE destination = ? AND class = ? AND first_commit = ?;

-- name: add_part
INSERT INTO part (destination, class, first_commit, part, parts, refused) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET refused = excluded.refused;

-- name: delete_part
DELETE FROM part WHERE destination = ? AND class = ? AND first_commit = ? AND part = ? AND parts = ?;

-- name: travel_whole_around
DELETE FROM part WHERE class = ? AND EXISTS (
    SELECT 1 FROM batch b
    WHERE b.destination = part.destination AND b.class = part.class AND b.first_commit = part.first_commit
      AND ? BETWEEN b.first_commit AND b.last_commit);

-- name: travel_whole
DELETE FROM part;

-- name: newest_written_before
SELECT position FROM segment WHERE position BETWEEN ? AND ? AND written_at_us <= ? ORDER BY position DESC LIMIT 1;

-- name: is_damaged
SELECT 1 FROM damaged WHERE position = ?;

-- name: positions_between
SELECT position FROM segment WHERE position BETWEEN ? AND ? ORDER BY position;

-- name: destination_known
SELECT 1 FROM destination WHERE name = ?;

-- name: drop_destination
DELETE FROM destination WHERE name = ?;

-- name: drop_delivered_of
DELETE FROM delivered WHERE destination = ?;

-- name: drop_batches_of
DELETE FROM batch WHERE destination = ?;

-- name: drop_parts_of
DELETE FROM part WHERE destination = ?;

-- name: received_up_to
SELECT first_commit, last_commit, parts FROM received
WHERE gateway_id = ? AND epoch = ? AND class = ? AND first_commit <= ?
ORDER BY first_commit DESC LIMIT 1;

-- name: received_parts_reaching_into
SELECT part, parts, rows, stored, duplicates, conflicts, min_time_us, max_time_us FROM received
WHERE gateway_id = ?1 AND epoch = ?2 AND class = ?3 AND first_commit = ?4
  AND part * ?6 > (?5 - 1) * parts AND (part - 1) * ?6 < ?5 * parts;

-- name: enter_received
-- Whoever brings a range waits for whoever brings the same one, so that there is none yet.
INSERT INTO received (gateway_id, epoch, class, first_commit, last_commit, part, parts, rows, stored, duplicates,
                      conflicts, refused, min_time_us, max_time_us, first_at_us, last_at_us)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING;

-- name: received_count
SELECT count(*) FROM received WHERE gateway_id = ? AND epoch = ? AND class = ?;

-- name: received_newer_than_newest
SELECT last_at_us FROM received WHERE gateway_id = ? AND epoch = ? AND class = ?
ORDER BY last_at_us DESC LIMIT 1 OFFSET ?;

-- name: received_of_class
SELECT first_commit, last_commit, part, parts, rows, stored, duplicates, conflicts, refused, min_time_us,
       max_time_us, first_at_us, last_at_us
FROM received WHERE gateway_id = ? AND epoch = ? AND class = ? AND last_at_us <= ?
ORDER BY first_commit, part;

-- name: drop_received
DELETE FROM received WHERE gateway_id = ? AND epoch = ? AND class = ? AND first_commit = ?;

-- name: received_of
SELECT epoch, class, first_commit, last_commit, part, parts, rows, stored, duplicates, conflicts, refused,
       min_time_us, max_time_us, first_at_us, last_at_us
FROM received WHERE gateway_id = ?1 AND (?2 IS NULL OR epoch = ?2)
ORDER BY epoch, class, first_commit, part;

-- name: gateways_received_from
SELECT DISTINCT gateway_id FROM received ORDER BY gateway_id;

-- name: earlier_answer
SELECT body_hash, answer FROM answered WHERE client = ? AND key = ? AND answered_at_us > ?;

-- name: keep_answer
INSERT INTO answered (client, key, body_hash, answer, answered_at_us) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (client, key) DO UPDATE
SET body_hash = excluded.body_hash, answer = excluded.answer, answered_at_us = excluded.answered_at_us;

-- name: forget_answers
DELETE FROM answered WHERE answered_at_us <= max(?, coalesce(
    (SELECT answered_at_us FROM answered ORDER BY answered_at_us DESC LIMIT 1 OFFSET ?), 0));

-- name: add_quarantine
INSERT INTO quarantine (received_at_us, source, topic, reason, detail, payload, payload_bytes)
VALUES (?, ?, ?, ?, ?, ?, ?);

-- name: quarantine_range
SELECT coalesce(min(quarantine_no), 1), coalesce(max(quarantine_no), 0) FROM quarantine;

-- name: drop_quarantine_below
DELETE FROM quarantine WHERE quarantine_no < ?;

-- name: quarantine_by_reason
SELECT reason, count(*), max(received_at_us) FROM quarantine GROUP BY reason ORDER BY count(*) DESC;

-- name: write_nothing
DELETE FROM meta WHERE key = '';

-- name: newest_written
SELECT written_at_us FROM segment ORDER BY position DESC LIMIT 1;

-- name: processing_state
SELECT key, value FROM processing_state;

-- name: set_processing_state
INSERT INTO processing_state (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value;

-- name: delete_processing_state
DELETE FROM processing_state WHERE key = ?;

-- name: processed_through
SELECT CAST(value AS INTEGER) FROM processing_state WHERE key = 'follower/progress';

-- name: segments_with_blocks
SELECT position, last_commit, rows, written_at_us, block FROM segment WHERE position BETWEEN ? AND ?
ORDER BY position;

-- name: indexed_between_times
SELECT position, last_commit, max_time_us FROM segment INDEXED BY segment_times
WHERE indexed = 1 AND min_time_us <= ? AND max_time_us >= ? AND position BETWEEN ? AND ?;

-- name: last_set_aside
SELECT max(set_aside_at_us) FROM damaged WHERE position BETWEEN ? AND ?;

-- name: add_outbox
INSERT INTO outbox (channel, queued_at_us, notice) VALUES (?, ?, ?);

-- name: cap_outbox
DELETE FROM outbox WHERE channel = ? AND outbox_no <= (
    SELECT outbox_no FROM outbox WHERE channel = ? ORDER BY outbox_no DESC LIMIT 1 OFFSET ?);

-- name: outbox_of
SELECT outbox_no, queued_at_us, notice FROM outbox WHERE channel = ? ORDER BY outbox_no;

-- name: delete_outbox
DELETE FROM outbox WHERE outbox_no = ?;

-- name: outbox_channels
SELECT DISTINCT channel FROM outbox;

-- name: drop_outbox_of
DELETE FROM outbox WHERE channel = ?;

-- name: outbox_totals
SELECT channel, count(*) FROM outbox GROUP BY channel;

-- name: park
INSERT INTO parked (boot_id, base_us, since_boot_us, rows, block) VALUES (?, ?, ?, ?, ?);

-- name: oldest_parked
SELECT parked_no, boot_id, base_us, since_boot_us, block FROM parked ORDER BY parked_no LIMIT 1;

-- name: unpark
DELETE FROM parked WHERE parked_no = ?;

-- name: parked_rows
SELECT coalesce(sum(rows), 0) FROM parked;

-- For the tools of an operator.
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

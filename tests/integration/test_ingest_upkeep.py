"""What the service tidies: old entries of the ledger become one, old answers go."""

from __future__ import annotations

import asyncpg
import pytest

from cloud_sync.ingest.program import maintain_once
from cloud_sync.ingest.settings import Database
from cloud_sync.timescale.sink import TimescaleSink
from tests.support.wire_examples import batch


@pytest.mark.parametrize(
    ("days", "left"),
    [(7, [(1, 3), (4, 4)]), (None, [(1, 1), (2, 2), (3, 3), (4, 4)])],
    ids=["7 days", "never"],
)
async def test_what_is_older_than_the_settings_say_is_tidied_and_the_rest_is_left(postgres_dsn, days, left):
    sink = TimescaleSink(postgres_dsn)
    for commit in range(1, 5):
        await sink.apply(batch(commit))
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(
        "UPDATE ingest_ledger SET applied_at = now() - interval '8 days' WHERE first_commit < 4"
    )
    for key, hours in (("old", 25), ("new", 23)):
        await connection.execute(
            "INSERT INTO idempotency VALUES ('c', $1, '', '', now() - $2 * interval '1 hour')", key, hours
        )

    settings = {"dsn": postgres_dsn, "merge_ledger_after_days": days}
    await maintain_once(sink, Database.model_validate(settings))

    entries = await connection.fetch("SELECT first_commit, last_commit FROM ingest_ledger ORDER BY 1")
    answers = await connection.fetch("SELECT key FROM idempotency")
    await connection.close()
    await sink.aclose()
    assert [tuple(entry) for entry in entries] == left
    assert [tuple(answer) for answer in answers] == [("new",)]

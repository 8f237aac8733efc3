"""What the service tidies now and then: the ledger, old answers, old rollups. Any replica may do it."""

from __future__ import annotations

import asyncio
import logging
import random
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from cloud_sync.database.clients import forget_answers
from cloud_sync.database.summaries import forget_rollups
from cloud_sync.errors import DeliveryError

if TYPE_CHECKING:
    from cloud_sync.destinations.timescaledb import TimescaleSink
    from cloud_sync.ingest.settings import Database

_log = logging.getLogger(__name__)
_PERIOD_S = 3600.0


async def keep_up(sink: TimescaleSink, database: Database) -> None:
    """Tidy every hour, at a moment of each replica's own; a fault waits for the next time."""
    while True:
        await asyncio.sleep(_PERIOD_S * random.uniform(0.5, 1.5))  # noqa: S311 - spreads replicas, keeps no secret
        try:
            await tidy_once(sink, database)
        except DeliveryError as fault:
            _log.warning("tidying is put off: %s", fault)


async def tidy_once(sink: TimescaleSink, database: Database) -> None:
    """Merge the ledger's old entries, drop old answers and rollups."""
    if database.merge_ledger_after_days is not None:
        await sink.merge_ledger(timedelta(days=database.merge_ledger_after_days))
    await sink.transact(forget_answers)
    for window_s, days in database.rollup_retention_days.items():
        await sink.transact(partial(forget_rollups, window_s=window_s, older_than=timedelta(days=days)))

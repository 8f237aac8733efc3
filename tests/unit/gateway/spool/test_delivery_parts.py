from __future__ import annotations

import pytest

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.errors import RefusedRow, StoreError
from tests.support.open_spool import NOW_US, open_spool


async def test_a_part_that_is_not_open_any_more_is_neither_halved_nor_refused(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        deliveries, request = spool.deliveries, ClaimRequest(now_us=NOW_US, max_rows=10)
        await spool.append([("a", i, 0.0) for i in range(4)])
        whole = await deliveries.claim("x", request)
        assert whole is not None
        batch = await deliveries.read_batch(whole, "x")
        assert batch is not None
        assert await deliveries.split_rows("x", whole)
        with pytest.raises(StoreError, match="not an open part any more"):
            await deliveries.split_rows("x", whole)
        with pytest.raises(StoreError, match="not an open part any more"):
            await deliveries.refuse("x", batch, [RefusedRow(0, "bad", "bad row")], now_us=NOW_US)
        half = await deliveries.claim("x", request)
        assert half is not None
        assert (half.part, half.parts) == (1, 2), "the spool goes on"

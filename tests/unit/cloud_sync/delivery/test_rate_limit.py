from __future__ import annotations

import pytest

from cloud_sync.delivery.batch_sender import MAX_BACKFILL_SPREAD_S, EndpointHealth, backfill_spread_s
from cloud_sync.delivery.lanes import MAX_CREDIT_S, MIN_ROWS, BatchSizer, Lane, SendBudget
from cloud_sync.model.records import Credit
from cloud_sync.runtime.rates import TokenBucket


def test_a_budget_is_kept_on_average_and_a_debt_is_paid_before_the_next():
    budget, at, sent = SendBudget(1000.0), 0.0, 0
    while at < 100:
        wait_s = budget.wait_s(Lane.BACKFILL, at)
        if wait_s:
            at += wait_s
            continue
        budget.spend(Lane.BACKFILL, wire_bytes=2500, rows=1, at=at)
        sent += 2500
    assert 100_000 <= sent <= 103_500


def test_live_borrows_what_backfill_must_wait_for_and_no_more():
    budget = SendBudget(1000.0)
    budget.spend(Lane.BACKFILL, wire_bytes=6000, rows=1, at=0.0)
    assert budget.wait_s(Lane.BACKFILL, 0.0) == 6.0
    assert budget.wait_s(Lane.LIVE, 0.0) == 0.0
    budget.spend(Lane.LIVE, wire_bytes=6000, rows=1, at=0.0)
    assert budget.wait_s(Lane.LIVE, 0.0) == 2.0
    assert budget.wait_s(Lane.BACKFILL, 0.0) == 12.0


def test_without_a_budget_nothing_waits():
    budget = SendBudget()
    budget.spend(None, wire_bytes=10**12, rows=10**9, at=0.0)
    assert [budget.wait_s(lane, 0.0) for lane in (None, *Lane)] == [0.0, 0.0, 0.0]
    assert budget.max_rows_in(5, Lane.BACKFILL, 2.0, 0.0) == float("inf")


def test_a_credit_holds_back_the_backlog_only_and_only_while_it_is_valid():
    budget = SendBudget()
    budget.grant(Credit(100.0, 30.0), 0.0)
    budget.spend(Lane.LIVE, wire_bytes=1, rows=10**6, at=0.0)
    assert budget.wait_s(Lane.BACKFILL, 0.0) == 0.0, "live spends none of it"
    budget.spend(Lane.BACKFILL, wire_bytes=1, rows=1000, at=0.0)
    assert budget.wait_s(Lane.BACKFILL, 0.0) == 10.0
    assert budget.wait_s(Lane.LIVE, 0.0) == 0.0
    assert budget.max_rows_in(5, Lane.BACKFILL, 2.0, 0.0) == 500
    assert budget.wait_s(Lane.BACKFILL, 31.0) == 0.0
    assert budget.max_rows_in(5, Lane.BACKFILL, 2.0, 31.0) == float("inf")


def test_a_credit_of_nothing_waits_until_it_runs_out_and_never_longer_than_an_hour():
    budget = SendBudget()
    budget.grant(Credit(0.0, 10**9), 0.0)
    budget.spend(Lane.BACKFILL, wire_bytes=1, rows=1, at=0.0)
    assert budget.wait_s(Lane.BACKFILL, 0.0) == MAX_CREDIT_S
    budget.grant(None, 1.0)
    assert budget.wait_s(Lane.BACKFILL, 1.0) == 0.0, "a receipt without a credit lifts it"


def test_a_new_credit_keeps_the_debt_of_the_old():
    budget = SendBudget()
    budget.grant(Credit(10.0, 30.0), 0.0)
    budget.spend(Lane.BACKFILL, wire_bytes=1, rows=100, at=0.0)
    budget.grant(Credit(50.0, 30.0), 0.0)
    assert budget.wait_s(Lane.BACKFILL, 0.0) == 2.0


def test_a_clock_that_stands_still_or_goes_back_gives_nothing():
    bucket = TokenBucket(10.0, 10.0)
    bucket.spend(50, 100.0)
    assert bucket.wait_s(90.0) == 5.0
    assert bucket.wait_s(100.0) == 5.0
    assert bucket.wait_s(104.0) == 1.0


def test_batches_grow_to_the_ceiling_while_requests_are_quick():
    sizer = BatchSizer(50_000)
    sizes = []
    for _ in range(5):
        sizes.append(sizer.rows)
        sizer.record_sent(sizer.rows, sizer.rows * 2, 0.1)
    assert sizes == [10_000, 20_000, 40_000, 50_000, 50_000]


def test_batches_shrink_until_a_request_takes_its_time_but_not_for_ever():
    sizer = BatchSizer(50_000, target_s=1.0)
    for _ in range(20):
        sizer.record_sent(sizer.rows, sizer.rows * 2, sizer.rows / 2000)
    assert 1800 <= sizer.rows <= 2600
    for _ in range(20):
        sizer.record_sent(sizer.rows, sizer.rows * 2, 60.0)
    assert sizer.rows == MIN_ROWS


def test_a_small_batch_says_nothing_against_large_ones():
    sizer = BatchSizer(10_000)
    sizer.record_sent(3, 300, 0.001)
    assert sizer.rows == 10_000


def test_what_was_too_large_is_remembered_and_tried_again_much_later():
    sizer = BatchSizer(50_000)
    sizer.record_too_large(10_000)
    assert sizer.rows == 5_000
    for _ in range(199):
        sizer.record_sent(5_000, 10_000, 0.01)
    assert sizer.rows == 5_000
    sizer.record_sent(5_000, 10_000, 0.01)
    assert 5_000 < sizer.rows < 7_000
    for _ in range(40):
        sizer.record_too_large(sizer.rows)
    assert sizer.rows == 1


def test_a_ceiling_in_bytes_holds_by_what_rows_have_taken():
    sizer = BatchSizer(50_000, max_bytes=100_000)
    sizer.record_sent(1000, 50_000, 0.1)
    assert sizer.rows == 2000


def test_a_link_remembers_an_outage_until_it_answers_and_then_spreads_the_backfill():
    health = EndpointHealth()
    assert [health.record_failure(at) for at in (10.0, 20.0, 110.0)] == [1, 2, 3]
    assert health.is_down
    health.record_answer(110.0, chance=0.5)
    assert (health.is_down, health.failures) == (False, 0)
    assert health.backfill_from == 115.0
    health.record_answer(200.0, chance=1.0)
    assert health.backfill_from == 115.0, "no outage, no waiting"


@pytest.mark.parametrize(("outage_s", "spread"), [(0, 0), (-5, 0), (10, 1), (10**6, MAX_BACKFILL_SPREAD_S)])
def test_short_outages_spread_little_and_long_ones_not_without_bound(outage_s, spread):
    assert backfill_spread_s(outage_s) == spread

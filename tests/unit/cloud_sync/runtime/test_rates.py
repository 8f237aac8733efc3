"""Token buckets and backoff: numbers in, numbers out."""

from __future__ import annotations

import ast
import inspect

import pytest

from cloud_sync.runtime import rates
from cloud_sync.runtime.rates import MAX_RETRY_AFTER_S, Backoff, TokenBucket, TokenBuckets


@pytest.mark.parametrize(("attempt", "most"), [(1, 1), (3, 4), (50, 60), (5000, 60)])
def test_backoff_grows_to_its_ceiling_with_full_jitter(attempt, most):
    backoff = Backoff(first_s=1, ceiling_s=60, floor_s=0.1)
    waits = [backoff.wait_s(attempt, chance) for chance in (0.0, 0.5, 1.0)]
    assert waits == [0.1, most / 2, most]


def test_the_same_chance_gives_the_same_wait_and_nothing_else_draws_it():
    backoff = Backoff()
    assert len({backoff.wait_s(4, 0.25) for _ in range(10)}) == 1
    names = {node.id for node in ast.walk(ast.parse(inspect.getsource(rates))) if isinstance(node, ast.Name)}
    assert not names & {"random", "time"}


def test_a_destinations_wish_is_a_floor_but_no_weapon():
    backoff = Backoff(first_s=1, ceiling_s=10)
    assert [backoff.wait_s(1, chance, retry_after_s=30) for chance in (0.0, 1.0)] == [30, 31]
    assert backoff.wait_s(1, 1.0, retry_after_s=10**9) == MAX_RETRY_AFTER_S + 1


def test_a_bucket_may_be_overspent_and_a_new_rate_keeps_the_debt():
    bucket = TokenBucket(2.0, 2.0)
    bucket.spend(6, now_s=0)
    assert (bucket.wait_s(0), bucket.wait_s(0, debt_s=2)) == (3, 1)
    bucket.change_rate(4.0, now_s=1)
    assert bucket.wait_s(1) == 1
    assert bucket.level(100) == 4


def test_a_bucket_refills_evenly_and_never_beyond_its_size():
    buckets: TokenBuckets[str] = TokenBuckets(2, 0.5)
    assert [buckets.try_spend("a", now_s=0) for _ in range(3)] == [True, True, False]
    assert not buckets.has_token("a", now_s=1.9)
    assert buckets.try_spend("a", now_s=2)
    assert not buckets.try_spend("a", now_s=2)
    assert [buckets.try_spend("a", now_s=1000) for _ in range(3)] == [True, True, False]
    assert buckets.has_token("b", now_s=0)


def test_beyond_its_bound_the_bucket_longest_not_used_is_forgotten():
    buckets: TokenBuckets[str] = TokenBuckets(1, 0, max_keys=2)
    for key in ("a", "b", "c"):
        buckets.try_spend(key, now_s=0)
    assert len(buckets) == 2
    assert [buckets.has_token(key, now_s=0) for key in ("a", "b", "c")] == [True, False, False]

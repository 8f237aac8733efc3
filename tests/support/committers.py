"""A committer on an open spool, for tests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from gateway.ingress.committer import Committer, CommitterHooks, CommitterOptions
from gateway.ingress.publish_decoder import PublishDecoder, SeriesResolver
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.topics import TopicTemplate

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.open_spool import OpenSpool

TEMPLATE = TopicTemplate("sensors/{sensor_id}/{sensor_type}")


def build_committer(
    spool: OpenSpool,
    rules: RuleSet | None = None,
    *,
    clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    on_rebirths_due: Callable[[], None] = lambda: None,
    hooks: CommitterHooks | None = None,
    **options: Any,
) -> Committer:
    """It commits without a pause between groups."""
    decoder = PublishDecoder(rules or RuleSet(TEMPLATE), SeriesResolver(spool.catalog), on_rebirths_due)
    given = CommitterOptions(**{"interval_s": 0, **options})
    return Committer(spool.appender, decoder, given, hooks, clock_us=clock_us)

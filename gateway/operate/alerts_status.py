"""What the operator reads of alerts: those that fire, the newest, and how the channels do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cloud_sync.notices import AlertState, Severity
from gateway.operate.records_summary import Alert, AlertsStatus

if TYPE_CHECKING:
    from gateway.processing.alerts import AlertStage
    from gateway.processing.notify import ChannelDesk
    from gateway.spool.series import SeriesBook

_SHOWN = 20


class ChannelStatus(msgspec.Struct):
    """One channel. `waiting` counts notices in its outbox, `given_up` those dropped unsent since start."""

    name: str
    sent: int
    failed: int
    given_up: int
    waiting: int
    last_error: str
    last_sent_at_us: int | None


def alerts_of(stage: AlertStage | None, book: SeriesBook) -> AlertsStatus | None:
    """The alerts of a running gateway; None when there are none to be."""
    if stage is None:
        return None
    shown: dict[tuple[str, int], Alert] = {}
    for event in reversed(stage.recent):
        key = (event.rule.name, event.series)
        if key not in shown:
            shown[key] = Alert(
                rule=event.rule.name,
                severity=event.rule.severity.name.lower(),
                subject=_subject(book, event.series),
                text=event.detail,
                since_us=event.change.at_us,
                firing=event.change.state is AlertState.FIRING,
            )
    for rule, series, fired_us in stage.firing_alerts(_SHOWN):
        shown.setdefault(
            (rule.name, series),
            Alert(rule.name, rule.severity.name.lower(), _subject(book, series), "", fired_us, firing=True),
        )
    newest = sorted(shown.values(), key=_order)
    counts = stage.firing
    return AlertsStatus(
        firing=sum(counts.values()), critical=counts.get(Severity.CRITICAL, 0), newest=newest[:_SHOWN]
    )


def channels_of(desks: tuple[ChannelDesk, ...], waiting: dict[str, int]) -> list[ChannelStatus]:
    """How every channel does."""
    return [
        ChannelStatus(
            name=desk.channel.name,
            sent=desk.counters.sent,
            failed=desk.counters.failed,
            given_up=desk.counters.given_up,
            waiting=waiting.get(desk.channel.name, 0),
            last_error=desk.counters.last_error,
            last_sent_at_us=desk.counters.last_sent_at_us,
        )
        for desk in desks
    ]


def _order(alert: Alert) -> tuple[bool, bool, int]:
    """What fires first, of that what is critical, then the latest."""
    return not alert.firing, alert.firing and alert.severity != "critical", -alert.since_us


def _subject(book: SeriesBook, series: int) -> str:
    return "/".join(book[series][:2])

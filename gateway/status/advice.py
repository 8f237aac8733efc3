"""What the status document means for a person: advice, most severe first, and the words for a destination's
state, which the terminal, the demo and systemd's status line share. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.humanize import format_duration, pluralize
from gateway.status.document import Advice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.status.document import AdviceSeverity, DestinationStatus, Status

_SEVERITY_ORDER: tuple[AdviceSeverity, ...] = ("good", "critical", "warning", "note")
_DAY_S = 86_400
_SPACE_CRITICAL_DAYS, _SPACE_WARNING_DAYS = 1.0, 7.0
_FLASH_WARNING_YEARS = 2.0
_FLASH_MIN_OBSERVED_S = 3600.0
_BACKLOG_WARNING_S = 300.0
_RECENT_S = 86_400.0
STATE_TEXTS = {
    "idle": "up to date",
    "sending": "sending",
    "waiting": "retrying",
    "held": "blocked",
    "stopped": "stopped",
}


def build_advice(status: Status) -> list[Advice]:
    """At least one entry: that all is well, if there is nothing to act on."""
    found = [
        *_input_advice(status),
        *_destination_advice(status),
        *_spool_advice(status),
        *_record_advice(status),
        *_processing_advice(status),
        *_flash_wear_advice(status),
        *(
            Advice("critical" if certificate.urgent else "warning", f"{certificate}; renew it.")
            for certificate in status.certificates
            if certificate.soon
        ),
    ]
    if all(advice.severity == "note" for advice in found):
        found.append(Advice("good", _healthy_text(status)))
    return sorted(found, key=lambda advice: _SEVERITY_ORDER.index(advice.severity))


def backlog_text(destination: DestinationStatus) -> str:
    """The backlog and the age of its oldest reading: "12 readings, the oldest 5 min 0 s old"."""
    text = pluralize(destination.backlog_readings, "reading", "readings")
    if destination.backlog_oldest_s is None:
        return text
    return f"{text}, the oldest {format_duration(destination.backlog_oldest_s)} old"


def drain_text(destination: DestinationStatus) -> str:
    """How long the backlog needs to drain: "-" without a backlog, "unknown" while it does not shrink."""
    if destination.backlog_readings == 0:
        return "-"
    return "unknown" if destination.drain_s is None else format_duration(destination.drain_s)


def _input_advice(status: Status) -> Iterator[Advice]:
    ingress, devices, clock = status.ingress, status.devices, status.clock
    if not status.running:
        yield Advice("critical", "The gateway is not running. This status was read from its spool.")
        return
    if ingress.holding_reason:
        text = f"Acknowledgements are withheld, devices keep their readings: {ingress.holding_reason}"
        yield Advice("critical", text)
    if devices is not None and devices.silent and devices.known > 0:
        who = pluralize(devices.silent, "device has", "devices have")
        what = f"{who} been silent for more than {format_duration(devices.silent_after_s)}."
        if devices.heard == 0:
            yield Advice("warning", f"No device is sending: {what}")
        else:
            yield Advice("note", what)
    if clock is not None and not clock.trusted:
        text = f"The gateway's clock is not trusted: {clock.why}."
        if clock.waiting:
            text += f" {pluralize(clock.waiting, 'reading waits', 'readings wait')} for the correct time."
        yield Advice("warning", text)


def _destination_advice(status: Status) -> Iterator[Advice]:
    if not status.destinations:
        yield Advice("note", "No destination is configured: readings stay in the spool.")
    for d in status.destinations:
        behind = (d.backlog_oldest_s or 0) >= _BACKLOG_WARNING_S
        if d.state == "held":
            yield Advice("critical", f"{d.name} is blocked, operator action required: {d.last_error}")
        elif d.last_error:
            yield Advice("warning", f"{d.name} is failing ({d.last_error}). Backlog: {backlog_text(d)}.")
        elif behind and d.drain_s:
            drained = f"drained in {drain_text(d)}"
            yield Advice("note", f"{d.name} is catching up: {backlog_text(d)}, {drained}.")
        elif behind:
            yield Advice("warning", f"{d.name} is not catching up: {backlog_text(d)}.")


def _spool_advice(status: Status) -> Iterator[Advice]:
    spool, days = status.spool, status.spool.room_days
    if days is not None and days < _SPACE_WARNING_DAYS and not all(map(_is_caught_up, status.destinations)):
        yield Advice(
            "critical" if days < _SPACE_CRITICAL_DAYS else "warning",
            f"At the present rate the spool is full in {format_duration(days * _DAY_S)}; after that, "
            "undelivered readings will be discarded or devices refused.",
        )
    if spool.damaged_readings:
        readings = pluralize(spool.damaged_readings, "reading is", "readings are")
        text = f"{readings} in damaged segments, set aside: `tidegate spool check` lists them."
        yield Advice("warning", text)


def _record_advice(status: Status) -> Iterator[Advice]:
    alerts, losses, quarantine = status.alerts, status.losses, status.quarantine
    if alerts is not None and alerts.firing:
        severity: AdviceSeverity = "critical" if alerts.critical else "warning"
        yield Advice(severity, f"{pluralize(alerts.firing, 'alert is', 'alerts are')} firing.")
    if losses is not None and losses.newest:
        recent = status.at_us - losses.newest[0].declared_at_us < _RECENT_S * 1e6
        readings = pluralize(losses.readings, "reading was", "readings were")
        when = "" if recent else ", none of them in the last 24 hours"
        yield Advice("warning" if recent else "note", f"{readings} discarded and declared lost{when}.")
    if quarantine is not None and quarantine.reasons:
        newest_us = max(reason.newest_at_us for reason in quarantine.reasons)
        if status.at_us - newest_us < _RECENT_S * 1e6:
            yield Advice("note", f"{pluralize(quarantine.items, 'item is', 'items are')} in quarantine.")


def _processing_advice(status: Status) -> Iterator[Advice]:
    for channel in status.channels:
        if channel.last_error:
            waiting = pluralize(channel.waiting, "notice waits", "notices wait")
            text = f"Alert channel {channel.name} is failing ({channel.last_error}): {waiting}."
            yield Advice("warning", text)
    if status.processing is not None and status.processing.last_error:
        yield Advice("warning", f"Rollups and alerts are not computed: {status.processing.last_error}")


def _flash_wear_advice(status: Status) -> Iterator[Advice]:
    wear = status.wear
    if wear is None or wear.years_left is None or wear.observed_s < _FLASH_MIN_OBSERVED_S:
        return
    if wear.years_left < _FLASH_WARNING_YEARS:
        left = format_duration(wear.years_left * 365 * _DAY_S)
        text = f"At this rate the flash lasts another {left}: raise spool.commit_interval_ms."
        yield Advice("warning", text)


def _healthy_text(status: Status) -> str:
    if not status.spool.readings_ever:
        return "All is well. No device has sent a reading yet."
    if not status.destinations:
        return "All is well: every reading is stored here."
    if all(map(_is_caught_up, status.destinations)):
        return "All is well: every reading is stored here and delivered."
    return "All is well: every reading is stored here, and delivery is under way."


def _is_caught_up(destination: DestinationStatus) -> bool:
    return (destination.backlog_oldest_s or 0) < _BACKLOG_WARNING_S and not destination.last_error

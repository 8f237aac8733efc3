"""What the status document means for a person: sentences, most severe first. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from gateway.humanize import format_count, format_duration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.status.document import DestinationStatus, Status

AdviceSeverity = Literal["critical", "warning", "note", "good"]
_SEVERITY_ORDER: tuple[AdviceSeverity, ...] = ("critical", "warning", "note", "good")
_SPACE_CRITICAL_DAYS, _SPACE_WARNING_DAYS = 1.0, 7.0
_FLASH_WARNING_YEARS = 2.0
_FLASH_MIN_OBSERVED_S = 3600.0
_BACKLOG_WARNING_S = 300.0
_RECENT_S = 86_400.0
_DAY_S = 86_400


class Advice(msgspec.Struct):
    """One sentence. `critical`: data is or will be lost, act; `warning`: look soon; `note`: good to know."""

    severity: AdviceSeverity
    text: str


def build_advice(status: Status) -> list[Advice]:
    """At least one remark: that all is well, if there is nothing else to say."""
    found = [
        *_input_advice(status),
        *_destination_advice(status),
        *_space_advice(status),
        *_record_advice(status),
        *_processing_advice(status),
        *_clock_advice(status),
        *_channel_advice(status),
        *_flash_wear_advice(status),
        *_certificate_advice(status),
    ]
    if all(remark.severity == "note" for remark in found):
        found.append(Advice("good", _healthy_text(status)))
    return sorted(
        found, key=lambda remark: _SEVERITY_ORDER.index(remark.severity) if remark.severity != "good" else -1
    )


def _certificate_advice(status: Status) -> Iterator[Advice]:
    for certificate in status.certificates:
        if certificate.soon:
            yield Advice("critical" if certificate.urgent else "warning", f"{certificate}; renew it.")


def _input_advice(status: Status) -> Iterator[Advice]:
    ingress, devices = status.ingress, status.devices
    if not status.running:
        yield Advice("critical", "The gateway is not running. What follows was read from its spool.")
        return
    if ingress.holding_reason:
        yield Advice(
            "critical",
            f"Acknowledgements are withheld, devices keep their readings: {ingress.holding_reason}",
        )
    if devices is not None and devices.silent and devices.known > 0:
        long = format_duration(devices.silent_after_s)
        who = _pluralize(devices.silent, "device has", "devices have")
        if devices.heard == 0:
            yield Advice("warning", f"Nothing is heard: {who} been silent for more than {long}.")
        else:
            yield Advice("note", f"{who} been silent for more than {long}.")


def _destination_advice(status: Status) -> Iterator[Advice]:
    if not status.destinations:
        yield Advice("note", "No destination is configured: readings stay in the spool.")
    for d in status.destinations:
        lacks = _pluralize(d.backlog_readings, "reading waits", "readings wait")
        oldest = "" if not d.backlog_oldest_s else f", the oldest for {format_duration(d.backlog_oldest_s)}"
        if d.state == "held":
            yield Advice("critical", f"{d.name} is held until someone sees to it: {d.last_error}")
        elif d.last_error:
            yield Advice("warning", f"{d.name} takes nothing now ({d.last_error}). {lacks}{oldest}.")
        elif d.drain_s and (d.backlog_oldest_s or 0) >= _BACKLOG_WARNING_S:
            yield Advice("note", f"{d.name} is catching up: {lacks}, done in {format_duration(d.drain_s)}.")
        elif (d.backlog_oldest_s or 0) >= _BACKLOG_WARNING_S:
            yield Advice("warning", f"{d.name} does not catch up: {lacks}{oldest}.")


def _space_advice(status: Status) -> Iterator[Advice]:
    days = status.spool.room_days
    if days is None or days >= _SPACE_WARNING_DAYS or all(map(_is_caught_up, status.destinations)):
        return
    left = format_duration(days * _DAY_S)
    yield Advice(
        "critical" if days < _SPACE_CRITICAL_DAYS else "warning",
        f"The spool has room for another {left} of what comes in. After that, what is not delivered is at "
        "stake.",
    )


def _record_advice(status: Status) -> Iterator[Advice]:
    alerts, losses, quarantine = status.alerts, status.losses, status.quarantine
    if alerts is not None and alerts.firing:
        severity: AdviceSeverity = "critical" if alerts.critical else "warning"
        yield Advice(severity, f"{_pluralize(alerts.firing, 'alert is', 'alerts are')} firing.")
    if losses is not None and losses.newest:
        lately = status.at_us - losses.newest[0].declared_at_us < _RECENT_S * 1e6
        yield Advice(
            "warning" if lately else "note",
            f"{_pluralize(losses.readings, 'reading was', 'readings were')} given up and declared"
            f"{'' if lately else ', none of them in the last 24 hours'}.",
        )
    if status.spool.damaged_readings:
        yield Advice(
            "warning",
            f"{_pluralize(status.spool.damaged_readings, 'reading is', 'readings are')} in damaged segments, "
            "set aside: `tidegate spool check` names them.",
        )
    if quarantine is not None and quarantine.reasons:
        newest_us = max(reason.newest_at_us for reason in quarantine.reasons)
        if status.at_us - newest_us < _RECENT_S * 1e6:
            yield Advice("note", f"{_pluralize(quarantine.items, 'item is', 'items are')} in quarantine.")


def _processing_advice(status: Status) -> Iterator[Advice]:
    for channel in status.channels:
        if channel.last_error:
            waiting = _pluralize(channel.waiting, "notice waits", "notices wait")
            yield Advice(
                "warning", f"Alerts are not told by {channel.name} ({channel.last_error}). {waiting}."
            )
    if status.processing is not None and status.processing.last_error:
        yield Advice("warning", f"Rollups and alerts wait: {status.processing.last_error}")


def _clock_advice(status: Status) -> Iterator[Advice]:
    clock = status.clock
    if clock is None or clock.trusted:
        return
    waiting = ""
    if clock.waiting:
        waiting = f" {_pluralize(clock.waiting, 'reading waits', 'readings wait')} for the true time."
    yield Advice("warning", f"The gateway's clock is in doubt: {clock.why}.{waiting}")


def _channel_advice(status: Status) -> Iterator[Advice]:
    for channel in status.channels:
        if channel.last_error:
            waiting = _pluralize(channel.waiting, "notice waits", "notices wait")
            yield Advice(
                "warning", f"Alerts cannot be told on {channel.name} ({channel.last_error}): {waiting}."
            )


def _flash_wear_advice(status: Status) -> Iterator[Advice]:
    wear = status.wear
    if wear is None or wear.years_left is None or wear.observed_s < _FLASH_MIN_OBSERVED_S:
        return
    if wear.years_left < _FLASH_WARNING_YEARS:
        left = format_duration(wear.years_left * 365 * _DAY_S)
        yield Advice(
            "warning", f"At this rate the flash lasts another {left}: raise spool.commit_interval_ms."
        )


def _healthy_text(status: Status) -> str:
    if not status.spool.readings_ever:
        return "All is well. No device has sent a reading yet."
    if not status.destinations:
        return "All is well: everything that came in is kept here."
    if all(map(_is_caught_up, status.destinations)):
        return "All is well: everything that came in is kept here and delivered."
    return "All is well: everything that came in is kept here and on its way."


def _is_caught_up(destination: DestinationStatus) -> bool:
    return (destination.backlog_oldest_s or 0) < _BACKLOG_WARNING_S and not destination.last_error


def _pluralize(count: int, one: str, many: str) -> str:
    return f"{format_count(count)} {one if count == 1 else many}"

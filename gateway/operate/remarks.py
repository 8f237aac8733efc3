"""What a person should know first, in sentences, the worst on top. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from gateway.operate.human import count_text, seconds_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.operate.status import DestinationStatus, Status

Severity = Literal["critical", "warning", "note", "good"]
_ORDER: tuple[Severity, ...] = ("critical", "warning", "note", "good")
_ROOM_SHORT_DAYS, _ROOM_LOW_DAYS = 1.0, 7.0
_WEAR_LOW_YEARS = 2.0
_WEAR_SEEN_S = 3600.0
_BACKLOG_OLD_S = 300.0
_RECENT_S = 86_400.0
_DAY_S = 86_400


class Remark(msgspec.Struct):
    """One sentence. `critical`: data is or will be lost, act; `warning`: look soon; `note`: good to know."""

    severity: Severity
    text: str


def remarks_of(status: Status) -> list[Remark]:
    """At least one remark: that all is well, if there is nothing else to say."""
    found = [
        *_of_input(status),
        *_of_destinations(status),
        *_of_room(status),
        *_of_records(status),
        *_of_processing(status),
        *_of_clock(status),
        *_of_channels(status),
        *_of_wear(status),
        *_of_certificates(status),
    ]
    if all(remark.severity == "note" for remark in found):
        found.append(Remark("good", _all_is_well(status)))
    return sorted(
        found, key=lambda remark: _ORDER.index(remark.severity) if remark.severity != "good" else -1
    )


def _of_certificates(status: Status) -> Iterator[Remark]:
    for certificate in status.certificates:
        if certificate.soon:
            yield Remark("critical" if certificate.urgent else "warning", f"{certificate}; renew it.")


def _of_input(status: Status) -> Iterator[Remark]:
    ingress, devices = status.ingress, status.devices
    if not status.running:
        yield Remark("critical", "The gateway is not running. What follows was read from its spool.")
        return
    if ingress.holding_reason:
        yield Remark(
            "critical",
            f"Acknowledgements are withheld, devices keep their readings: {ingress.holding_reason}",
        )
    if devices is not None and devices.silent and devices.known > 0:
        long = seconds_text(devices.silent_after_s)
        who = _counted(devices.silent, "device has", "devices have")
        if devices.heard == 0:
            yield Remark("warning", f"Nothing is heard: {who} been silent for more than {long}.")
        else:
            yield Remark("note", f"{who} been silent for more than {long}.")


def _of_destinations(status: Status) -> Iterator[Remark]:
    if not status.destinations:
        yield Remark("note", "No destination is configured: readings stay in the spool.")
    for d in status.destinations:
        lacks = _counted(d.backlog_readings, "reading waits", "readings wait")
        oldest = "" if not d.backlog_oldest_s else f", the oldest for {seconds_text(d.backlog_oldest_s)}"
        if d.state == "held":
            yield Remark("critical", f"{d.name} is held until someone sees to it: {d.last_error}")
        elif d.last_error:
            yield Remark("warning", f"{d.name} takes nothing now ({d.last_error}). {lacks}{oldest}.")
        elif d.drain_s and (d.backlog_oldest_s or 0) >= _BACKLOG_OLD_S:
            yield Remark("note", f"{d.name} is catching up: {lacks}, done in {seconds_text(d.drain_s)}.")
        elif (d.backlog_oldest_s or 0) >= _BACKLOG_OLD_S:
            yield Remark("warning", f"{d.name} does not catch up: {lacks}{oldest}.")


def _of_room(status: Status) -> Iterator[Remark]:
    days = status.spool.room_days
    if days is None or days >= _ROOM_LOW_DAYS or all(map(_is_current, status.destinations)):
        return
    left = seconds_text(days * _DAY_S)
    yield Remark(
        "critical" if days < _ROOM_SHORT_DAYS else "warning",
        f"The spool has room for another {left} of what comes in. After that, what is not delivered is at "
        "stake.",
    )


def _of_records(status: Status) -> Iterator[Remark]:
    alerts, losses, quarantine = status.alerts, status.losses, status.quarantine
    if alerts is not None and alerts.firing:
        severity: Severity = "critical" if alerts.critical else "warning"
        yield Remark(severity, f"{_counted(alerts.firing, 'alert is', 'alerts are')} firing.")
    if losses is not None and losses.newest:
        lately = status.at_us - losses.newest[0].declared_at_us < _RECENT_S * 1e6
        yield Remark(
            "warning" if lately else "note",
            f"{_counted(losses.readings, 'reading was', 'readings were')} given up and declared"
            f"{'' if lately else ', none of them in the last 24 hours'}.",
        )
    if status.spool.damaged_readings:
        yield Remark(
            "warning",
            f"{_counted(status.spool.damaged_readings, 'reading is', 'readings are')} in damaged segments, "
            "set aside: `tidegate spool check` names them.",
        )
    if quarantine is not None and quarantine.reasons:
        newest_us = max(reason.newest_at_us for reason in quarantine.reasons)
        if status.at_us - newest_us < _RECENT_S * 1e6:
            yield Remark("note", f"{_counted(quarantine.items, 'item is', 'items are')} in quarantine.")


def _of_processing(status: Status) -> Iterator[Remark]:
    for channel in status.channels:
        if channel.last_error:
            waiting = _counted(channel.waiting, "notice waits", "notices wait")
            yield Remark(
                "warning", f"Alerts are not told by {channel.name} ({channel.last_error}). {waiting}."
            )
    if status.processing is not None and status.processing.last_error:
        yield Remark("warning", f"Rollups and alerts wait: {status.processing.last_error}")


def _of_clock(status: Status) -> Iterator[Remark]:
    clock = status.clock
    if clock is None or clock.trusted:
        return
    waiting = ""
    if clock.waiting:
        waiting = f" {_counted(clock.waiting, 'reading waits', 'readings wait')} for the true time."
    yield Remark("warning", f"The gateway's clock is in doubt: {clock.why}.{waiting}")


def _of_channels(status: Status) -> Iterator[Remark]:
    for channel in status.channels:
        if channel.last_error:
            waiting = _counted(channel.waiting, "notice waits", "notices wait")
            yield Remark(
                "warning", f"Alerts cannot be told on {channel.name} ({channel.last_error}): {waiting}."
            )


def _of_wear(status: Status) -> Iterator[Remark]:
    wear = status.wear
    if wear is None or wear.years_left is None or wear.observed_s < _WEAR_SEEN_S:
        return
    if wear.years_left < _WEAR_LOW_YEARS:
        left = seconds_text(wear.years_left * 365 * _DAY_S)
        yield Remark(
            "warning", f"At this rate the flash lasts another {left}: raise spool.commit_interval_ms."
        )


def _all_is_well(status: Status) -> str:
    if not status.spool.readings_ever:
        return "All is well. No device has sent a reading yet."
    if not status.destinations:
        return "All is well: everything that came in is kept here."
    if all(map(_is_current, status.destinations)):
        return "All is well: everything that came in is kept here and delivered."
    return "All is well: everything that came in is kept here and on its way."


def _is_current(destination: DestinationStatus) -> bool:
    return (destination.backlog_oldest_s or 0) < _BACKLOG_OLD_S and not destination.last_error


def _counted(count: int, one: str, many: str) -> str:
    return f"{count_text(count)} {one if count == 1 else many}"

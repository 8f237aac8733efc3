r"""Rollups, alerts and declarations as InfluxDB line protocol. Pure.

    rollup,gateway_id=barn-1,sensor_id=t-17,sensor_type=temperature,window_s=60 count=60i,mean=21.5,...
    alert,gateway_id=barn-1,rule=too_hot,sensor_id=t-17,sensor_type=temperature,severity=critical state=...
    declared_loss,class=reading,first_commit=11,gateway_id=barn-1,reason=max_bytes rows=100i,...

Tags are what identifies a record, so that a newer revision of a window overwrites the older one in place;
attributes of the sensor are not among them, for they may change within a window. Times of fields are
integers, microseconds since 1970. Values that are not there (NaN) are left out.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from cloud_sync.codec.line_protocol import Precision, encode_lines, escape_tag
from cloud_sync.model.records import Alerts, AlertState, Declarations, RecordClass, Rollups, Severity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloud_sync.model.records import Batch

_STRING_SPECIALS = re.compile(r'(["\\])')
_FLOATS = ("mean", "m2", "minimum", "maximum", "first", "last")
_INTEGERS = ("count", "flagged", "excluded", "suppressed", "revision", "first_at_us", "last_at_us")


def encode_record_lines(batch: Batch, *, tags: Sequence[str], precision: Precision) -> list[str]:
    """One line a record of a batch of any class, in its order, without line ends; `tags` are of readings."""
    records = batch.records
    if isinstance(records, Rollups):
        return _rollup_lines(batch, records, _time_scale(precision))
    if isinstance(records, Alerts):
        return _alert_lines(batch, records, _time_scale(precision))
    if isinstance(records, Declarations):
        return _declaration_lines(batch, records, _time_scale(precision))
    return encode_lines(batch, tags=tags, precision=precision)


def _rollup_lines(batch: Batch, rollups: Rollups, scale: int) -> list[str]:
    keys = [
        _line_key(
            "rollup", gateway_id=batch.range.gateway_id, sensor_id=s.sensor_id, sensor_type=s.sensor_type
        )
        for s in batch.series
    ]
    integers = [getattr(rollups, name).tolist() for name in _INTEGERS]
    floats = [getattr(rollups, name).tolist() for name in _FLOATS]
    found = []
    for row, (series, window_s, time_us) in enumerate(
        zip(rollups.series.tolist(), rollups.window_s.tolist(), rollups.time_us.tolist(), strict=True)
    ):
        fields = [f"{name}={column[row]}i" for name, column in zip(_INTEGERS, integers, strict=True)]
        fields += [
            f"{name}={column[row]!r}"
            for name, column in zip(_FLOATS, floats, strict=True)
            if math.isfinite(column[row])
        ]
        found.append(f"{keys[series]},window_s={window_s} {','.join(fields)} {time_us * scale}")
    return found


def _alert_lines(batch: Batch, alerts: Alerts, scale: int) -> list[str]:
    found = []
    for row in range(alerts.rows):
        series = batch.series[int(alerts.series[row])]
        key = _line_key(
            "alert",
            gateway_id=batch.range.gateway_id,
            rule=str(alerts.rule[row]),
            sensor_id=series.sensor_id,
            sensor_type=series.sensor_type,
            severity=Severity(int(alerts.severity[row])).name.lower(),
        )
        fields = [
            f"state={_quote_string(AlertState(int(alerts.state[row])).name.lower())}",
            f"count={alerts.count[row]}i",
            f"detail={_quote_string(str(alerts.detail[row]))}",
        ]
        for name in ("value", "threshold"):
            number = float(getattr(alerts, name)[row])
            if math.isfinite(number):
                fields.append(f"{name}={number!r}")
        found.append(f"{key} {','.join(fields)} {int(alerts.time_us[row]) * scale}")
    return found


def _declaration_lines(batch: Batch, declared: Declarations, scale: int) -> list[str]:
    found = []
    for row in range(declared.rows):
        number = int(declared.of_class[row])
        known = number in set(RecordClass)
        key = _line_key(
            "declared_loss",
            **{"class": RecordClass(number).name.lower() if known else str(number)},
            first_commit=str(declared.first_commit[row]),
            gateway_id=batch.range.gateway_id,
            reason=str(declared.reason[row]),
        )
        fields = (
            f"rows={declared.lost[row]}i",
            f"last_commit={declared.last_commit[row]}i",
            f"from_us={declared.from_us[row]}i",
            f"to_us={declared.to_us[row]}i",
            f"epoch={_quote_string(str(batch.range.epoch))}",
            f"survives={_quote_string(str(declared.survives[row]))}",
        )
        found.append(f"{key} {','.join(fields)} {int(declared.time_us[row]) * scale}")
    return found


def _line_key(measurement: str, **tags: str) -> str:
    """Measurement and tags, which are given in the order of their names."""
    return ",".join((measurement, *(f"{name}={escape_tag(text)}" for name, text in tags.items() if text)))


def _quote_string(text: str) -> str:
    """A field of text. A line break in it would end the line for some readers: it becomes a space."""
    return '"' + _STRING_SPECIALS.sub(r"\\\1", " ".join(text.splitlines())) + '"'


def _time_scale(precision: Precision) -> int:
    return 1000 if precision == "ns" else 1

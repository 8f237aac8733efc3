"""Lines of columns: `2026-05-01T12:00:00Z,21.5,40`; the rule says what each column is. Pure.

A line may be quoted as in RFC 4180. A line whose first column is that column's own name is a header and is
skipped. A bad line costs itself.
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from gateway.ingress.formats.fields import RecordReader
from gateway.ingress.formats.measurement import MEMBERS_MAX, Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.ingress.formats.measurement import Decoded
    from gateway.ingress.formats.rule import Rule


def decoder(rule: Rule, levels: Mapping[str, str]) -> Callable[[bytes, int], Decoded]:
    """What decodes the payloads of one topic, whose named levels are given."""
    columns = rule.columns

    def line_of(record: dict[str, Any]) -> bytes:
        """The line of a record; columns it does not have are empty."""
        out = io.StringIO()
        writer = csv.writer(out, delimiter=rule.separator, lineterminator="")
        writer.writerow([record.get(column, "") for column in columns])
        return out.getvalue().encode()

    reader = RecordReader(rule, levels, text_counts=True, part=line_of)

    def decode(payload: bytes, now_us: int) -> Decoded:  # noqa: ARG001 - of every decoder
        try:
            text = payload.decode()
        except UnicodeDecodeError as fault:
            return (), [Fault("not_utf8", str(fault), payload)]
        records, faults = [], []
        lines = text.splitlines()
        if len(lines) > MEMBERS_MAX:
            return (), [Fault("too_many_members", f"{len(lines)} lines; at most {MEMBERS_MAX}", payload)]
        for position, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                (cells,) = csv.reader([line], delimiter=rule.separator, strict=True)
            except (csv.Error, ValueError) as fault:
                faults.append(Fault("bad_line", f"line {position}: {fault}", line.encode()))
                continue
            if len(cells) != len(columns):
                what = f"line {position}: {len(cells)} columns; expected {len(columns)}: {', '.join(columns)}"
                faults.append(Fault("bad_line", what, line.encode()))
            elif cells[0].strip() != columns[0]:
                pairs = zip(columns, cells, strict=True)
                records.append({name: cell.strip() or None for name, cell in pairs if name})
        found, more = reader.read_all(records)
        return found, faults + more

    return decode

"""Lines of the log: shaped for who reads them, harmless, and not repeated."""

from __future__ import annotations

import io
import json
import logging

import pytest

from cloud_sync.runtime.logs import LogFormatter, RepeatFilter, is_journal


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(message: str, *values: object, level: int = logging.WARNING, fault: bool = False):
    exc_info = None
    if fault:
        try:
            int("two\nlines")
        except ValueError as raised:
            exc_info = (type(raised), raised, raised.__traceback__)
    return logging.LogRecord("gateway.spool", level, __file__, 1, message, values, exc_info)


@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.CRITICAL, "<2>"),
        (logging.ERROR, "<3>"),
        (logging.WARNING, "<4>"),
        (logging.INFO, "<6>"),
        (logging.DEBUG, "<7>"),
    ],
)
def test_the_journal_gets_a_priority_and_no_time(level, priority):
    assert LogFormatter("auto", journal=True).format(record("full: %d %%", 3, level=level)) == (
        f"{priority}gateway.spool: full: 3 %"
    )


def test_every_line_of_a_traceback_has_the_priority_of_the_first():
    lines = (
        LogFormatter("auto", journal=True).format(record("no", fault=True, level=logging.ERROR)).split("\n")
    )
    assert len(lines) > 4
    assert all(line.startswith("<3>") for line in lines)


def test_a_message_cannot_pretend_to_be_two_or_move_the_cursor():
    text = LogFormatter("text", journal=False).format(
        record("from %s", "a\n2026-01-01 ERROR root: gone\x1b[2J\u202e")
    )
    first, second = text.split("\n")
    assert second.startswith("  2026")
    assert "\x1b" not in text
    assert "\\x1b[2J\\x202e" in second
    assert "WARNING gateway.spool: from a" in first


def test_json_is_one_object_a_line_with_the_traceback_inside():
    line = LogFormatter("json", journal=True).format(record('it said "%s"', "x\ny", fault=True))
    assert line.startswith("<4>{")
    entry = json.loads(line[3:])
    assert entry["message"] == 'it said "x\ny"'
    assert entry["level"] == "warning"
    assert entry["at"].endswith("Z")
    assert "ValueError" in entry["exception"]
    assert "\n" not in line


def test_the_same_message_is_said_once_a_minute_with_a_count():
    clock = Clock()
    repeats = RepeatFilter(clock)
    said = [repeats.filter(record("no answer from %s", "region")) for _ in range(5)]
    assert said == [True, False, False, False, False]
    assert repeats.filter(record("no answer from %s", "cloud"))
    clock.now += 61
    again = record("no answer from %s", "region")
    assert repeats.filter(again)
    assert again.getMessage() == "no answer from region (4 more like this, not shown)"


def test_messages_of_one_form_are_bounded_though_each_is_another():
    clock = Clock()
    repeats = RepeatFilter(clock)
    assert sum(repeats.filter(record("closed %d%%", n)) for n in range(100)) == 20
    assert repeats.filter(record("another form"))
    clock.now += 61
    again = record("closed %d%%", 1000)
    assert repeats.filter(again)
    assert again.getMessage() == "closed 1000% (80 more of this kind, not shown)"


def test_what_is_remembered_of_messages_is_bounded():
    repeats = RepeatFilter(Clock())
    for n in range(5000):
        repeats.filter(record(f"form {n}"))
    assert len(repeats._counts) <= 1000


def test_errors_with_a_traceback_and_debugging_are_never_held_back():
    repeats = RepeatFilter(Clock())
    assert all(repeats.filter(record("no", fault=True)) for _ in range(30))
    assert all(repeats.filter(record("no", level=logging.DEBUG)) for _ in range(30))


def test_only_the_stream_that_systemd_connected_leads_to_the_journal(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        there = (tmp_path / "log").stat()
        assert is_journal(stream, {"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino}"})
        assert not is_journal(stream, {"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino + 1}"})
        assert not is_journal(stream, {})
    assert not is_journal(io.StringIO(), {"JOURNAL_STREAM": "1:2"})

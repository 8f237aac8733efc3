from __future__ import annotations

from datetime import UTC, datetime

import pytest

from cloud_sync.delivery.lanes import Schedule, parse_window


def at(text: str) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1e6)


@pytest.mark.parametrize(
    ("window", "open_at", "closed_at"),
    [
        ("22:00-06:00", ["2026-05-01T22:00", "2026-05-01T00:00", "2026-05-02T05:59"], ["2026-05-01T06:00"]),
        ("12:30-13:00", ["2026-05-03T12:30"], ["2026-05-03T13:00", "2026-05-03T12:29"]),
        # 2026-05-01 is a Friday
        (
            "Mon-Fri 22:00-06:00",
            ["2026-05-01T23:00", "2026-05-02T05:00"],
            ["2026-05-02T22:00", "2026-05-04T05:00"],
        ),
        (
            "Sat,Sun 00:00-24:00",
            ["2026-05-02T00:00", "2026-05-03T23:59"],
            ["2026-05-01T23:59", "2026-05-04T00:00"],
        ),
        ("Fri-Mon 08:00-09:00", ["2026-05-01T08:00", "2026-05-04T08:30"], ["2026-05-05T08:00"]),
        ("sunday 08:00-08:00", ["2026-05-03T08:00", "2026-05-04T07:59"], ["2026-05-04T08:00"]),
    ],
)
def test_a_window_is_open_when_it_says(window, open_at, closed_at):
    schedule = Schedule.parse([window])
    assert [moment for moment in open_at if not schedule.is_open(at(moment))] == []
    assert [moment for moment in closed_at if schedule.is_open(at(moment))] == []


def test_windows_are_in_the_local_time_of_their_zone_in_summer_and_winter():
    schedule = Schedule.parse(["08:00-09:00"], "Europe/Vienna")
    assert schedule.is_open(at("2026-07-01T06:30"))
    assert schedule.is_open(at("2026-01-01T07:30"))
    assert not schedule.is_open(at("2026-07-01T07:30"))


def test_without_windows_it_is_always_open_and_with_several_while_one_is():
    assert Schedule().is_open(at("2026-05-01T12:00"))
    two = Schedule.parse(["01:00-02:00", "03:00-04:00"])
    assert [two.is_open(at(f"2026-05-01T0{h}:30")) for h in range(5)] == [False, True, False, True, False]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "22-06",
        "Mon",
        "Mon 22:00",
        "25:00-26:00",
        "12:60-13:00",
        "Foo 12:00-13:00",
        "24:00-01:00",
        "1:00-2:00x",
    ],
)
def test_what_is_no_window_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"window|time of day|write Mon|24:00"):
        parse_window(text)


def test_an_unknown_time_zone_is_refused():
    with pytest.raises(ValueError, match="no time zone"):
        Schedule.parse([], "Mars/Olympus")

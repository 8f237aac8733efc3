"""The outbox and the desk that empties it: gathered, told once, tried again, bounded."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from cloud_sync.model.records import AlertState, Severity
from cloud_sync.runtime.rates import Backoff
from gateway.alerts.notifier import AlertNotifier, ChannelError, NotifierOptions, build_message
from gateway.spool import processing_state
from gateway.spool.database import Database
from gateway.spool.processing_state import AlertExample, AlertNotice

if TYPE_CHECKING:
    from gateway.alerts.notifier import AlertMessage

NOW_US = 1_790_000_000_000_000


def notice(
    *names: str, rule: str = "hot", state: AlertState = AlertState.FIRING, series: int | None = None
) -> AlertNotice:
    examples = tuple(AlertExample(name, "t", NOW_US, 36.0, 35.0, 1, "value 36 is above 35") for name in names)
    return AlertNotice(rule, Severity.CRITICAL, state, len(names) if series is None else series, examples)


@dataclass
class Phone:
    """A channel that writes down what it was told, and is out of order for a while."""

    name: str = "phone"
    broken: int = 0
    told: list[AlertMessage] = field(default_factory=list)

    async def send(self, message: AlertMessage) -> None:
        if self.broken:
            self.broken -= 1
            raise ChannelError("nobody answers")
        self.told.append(message)

    async def aclose(self) -> None:
        pass


@dataclass
class Time:
    s: float = 0.0
    jumped_s: float = 0.0

    def us(self) -> int:
        return NOW_US + round((self.s + self.jumped_s) * 1e6)

    def monotonic(self) -> float:
        return self.s


@asynccontextmanager
async def notifier(path, phone, *, terms=NotifierOptions(), time=None):  # noqa: B008 - an immutable value
    database = await Database.open(path)
    time = time or Time()
    try:
        yield (
            AlertNotifier(
                phone,
                database,
                "g",
                terms,
                backoff=Backoff(first_s=1, ceiling_s=8, floor_s=0.5),
                clock_us=time.us,
                monotonic=time.monotonic,
            ),
            database,
            time,
        )
    finally:
        await database.close()


async def put(database, *notices: AlertNotice, channels=("phone",), now_us=NOW_US) -> None:
    for one in notices:
        await database.write(lambda c, one=one: processing_state.queue_notice(c, channels, one, now_us))


async def test_what_one_rule_says_within_the_wait_is_one_message(tmp_path):
    phone = Phone()
    async with notifier(tmp_path / "spool.db", phone) as (at_desk, database, time):
        await put(database, notice("a"), notice("b", "c"), notice("b", state=AlertState.RECOVERED))
        await at_desk.send_once()
        time.s = 4.9
        await put(database, notice("d"))
        await at_desk.send_once()
        assert phone.told == []
        time.s = 5
        await at_desk.send_once()
        assert [(m.rule, m.firing, m.recovered) for m in phone.told] == [("hot", 4, 1)]
        await at_desk.send_once()
        assert len(phone.told) == 1
        assert await database.read(processing_state.outbox_totals) == ({}, 0)


async def test_a_rule_that_goes_on_is_heard_once_an_interval_and_another_rule_at_once(tmp_path):
    phone = Phone()
    async with notifier(tmp_path / "spool.db", phone) as (at_desk, database, time):
        for second in range(0, 200, 5):
            time.s = second
            await put(database, notice("a"))
            if second == 20:
                await put(database, notice("x", rule="cold"))
            await at_desk.send_once()
        assert [(m.rule, m.firing) for m in phone.told] == [
            ("hot", 2),
            ("cold", 1),
            ("hot", 12),
            ("hot", 12),
            ("hot", 12),
        ]


async def test_a_flood_is_one_message_that_names_the_first_few(tmp_path):
    phone = Phone()
    async with notifier(tmp_path / "spool.db", phone, terms=NotifierOptions(group_wait_s=0)) as (
        at_desk,
        database,
        _,
    ):
        await put(database, notice(*(f"d{n}" for n in range(20)), series=7000), notice("z", series=3000))
        await at_desk.send_once()
        (message,) = phone.told
        assert message.subject == "CRITICAL: hot, 10000 firing at g"
        assert message.text.splitlines()[1] == "d0/t: value 36 is above 35"
        assert len(message.examples) == 20
        assert message.text.endswith("and 9980 more")


async def test_a_channel_out_of_order_is_tried_again_and_told_once(tmp_path):
    phone = Phone(broken=3)
    async with notifier(tmp_path / "spool.db", phone, terms=NotifierOptions(group_wait_s=0)) as (
        at_desk,
        database,
        _,
    ):
        await put(database, notice("a"))
        waits = [await at_desk.send_once() for _ in range(4)]
        assert all(wait >= 0.5 for wait in waits)
        assert len(phone.told) == 1
        assert (at_desk.counters.failed, at_desk.counters.sent, at_desk.counters.last_error) == (3, 1, "")


async def test_what_cannot_be_told_in_time_is_dropped_and_counted(tmp_path, caplog):
    phone = Phone(broken=10**9)
    terms = NotifierOptions(group_wait_s=0, give_up_s=3600)
    async with notifier(tmp_path / "spool.db", phone, terms=terms) as (at_desk, database, time):
        await put(database, notice("a"))
        await at_desk.send_once()
        time.s = 3601
        await put(database, notice("b"), now_us=time.us())
        await at_desk.send_once()
        assert at_desk.counters.given_up == 1
        assert await database.read(processing_state.outbox_totals) == ({"phone": 1}, 1)
        assert "dropped 1 notices" in caplog.text


async def test_what_waited_while_the_gateway_was_off_is_told_after_the_start(tmp_path):
    phone = Phone(broken=1)
    async with notifier(tmp_path / "spool.db", phone, terms=NotifierOptions(group_wait_s=0)) as (
        at_desk,
        database,
        _,
    ):
        await put(database, notice("a"))
        await at_desk.send_once()
    async with notifier(tmp_path / "spool.db", phone, terms=NotifierOptions(group_wait_s=0)) as (
        at_desk,
        _,
        _,
    ):
        await at_desk.send_once()
        assert [m.firing for m in phone.told] == [1]


async def test_a_clock_that_was_wrong_when_it_was_queued_does_not_keep_a_notice_for_ever(tmp_path):
    phone = Phone(broken=10**9)
    terms = NotifierOptions(group_wait_s=0, give_up_s=60)
    async with notifier(tmp_path / "spool.db", phone, terms=terms) as (at_desk, database, time):
        await put(database, notice("a"), now_us=NOW_US + 10**15)
        await at_desk.send_once()
        time.s = 61
        await at_desk.send_once()
        assert await database.read(processing_state.outbox_totals) == ({}, 1)


async def test_the_outbox_of_a_channel_is_bounded_and_the_oldest_gives_way(tmp_path, monkeypatch):
    monkeypatch.setattr(processing_state, "ROWS_MAX", 3)
    async with notifier(tmp_path / "spool.db", Phone()) as (_, database, _):
        await put(database, *(notice(f"d{n}") for n in range(5)), channels=("phone", "other"))
        found = await database.read(lambda c: processing_state.read_queued_notices(c, "phone"))
        assert [w.notice.examples[0].sensor_id for w in found] == ["d2", "d3", "d4"]
        assert await database.read(processing_state.outbox_totals) == ({"phone": 3, "other": 3}, 4)


async def test_what_is_queued_for_a_channel_that_is_gone_is_forgotten(tmp_path):
    async with notifier(tmp_path / "spool.db", Phone()) as (_, database, _):
        await put(database, notice("a"), channels=("phone", "gone"))
        assert await database.write(lambda c: processing_state.delete_other_channels(c, ["phone"])) == 1
        assert await database.read(processing_state.outbox_totals) == ({"phone": 1}, 0)


@pytest.mark.parametrize(
    ("notices", "subject"),
    [
        ([notice("a")], "CRITICAL: hot of a/t at g"),
        ([notice("a", state=AlertState.RECOVERED)], "CRITICAL recovered: hot of a/t at g"),
        ([notice("a", "b")], "CRITICAL: hot, 2 firing at g"),
        (
            [notice("a"), notice("b", state=AlertState.RECOVERED)],
            "CRITICAL: hot, 1 firing and 1 recovered at g",
        ),
    ],
)
def test_the_subject_says_how_bad_which_rule_and_how_many(notices, subject):
    assert build_message("g", notices).subject == subject


async def test_a_clock_that_is_set_right_makes_no_message_too_old(tmp_path):
    phone, time = Phone(broken=1), Time()
    async with notifier(tmp_path / "spool.db", phone, time=time) as (at_desk, database, _):
        await put(database, notice("a"))
        await at_desk.send_once()
        time.jumped_s = 56 * 365 * 86_400
        time.s = 10
        await at_desk.send_once()
        time.s = 20
        await at_desk.send_once()
        assert [m.firing for m in phone.told] == [1]
        assert at_desk.counters.given_up == 0

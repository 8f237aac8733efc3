"""Who is admitted and as whom: names, passwords, certificates, guessing, and what each may publish."""

import asyncio
import os
from collections import Counter

import pytest

from cloud_sync.runtime.rates import TokenBuckets
from gateway.auth import authenticator as doorkeeper_module
from gateway.auth.authenticator import (
    AuthenticationPolicy,
    Credentials,
    CredentialsAuthenticator,
    Identity,
    Refusal,
    allow_own_topics,
    allow_unregistered_topics,
    device_name_from_certificate,
)
from gateway.auth.device_passwords import PasswordHash, hash_password
from gateway.mqtt.codec.packets import Connack, ReasonCode
from gateway.mqtt.handshake import build_refusal_connack
from gateway.payloads.topics import TopicTemplate

TEMPLATE = TopicTemplate("sensors/{sensor_id}/{sensor_type}")
WRONG, RATE, NOT_AUTHORIZED = Refusal(0x86), Refusal(0x9F), Refusal(0x87)
HOME = "192.0.2.1"


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def certificate(common_name="pump-1", *dns):
    return {
        "subject": ((("organizationName", "farm"),), (("commonName", common_name),)),
        "subjectAltName": tuple(("DNS", name) for name in dns),
    }


class Door:
    """A doorkeeper, its file and its clock."""

    def __init__(self, folder, devices=("pump-1", "pump-2"), **policy):
        self.path = folder / "passwords"
        self.clock = Clock()
        self.write(**dict.fromkeys(devices, "secret"))
        policy = {"identity": "username", "allow_anonymous": False, "publish_as_self": True, **policy}
        self.doorkeeper = CredentialsAuthenticator(
            AuthenticationPolicy(**policy), TEMPLATE, self.path if devices else None, clock_s=self.clock
        )

    def write(self, **passwords):
        lines = [f"{name}:{hash_password(word.encode(), ln=4)}\n" for name, word in passwords.items()]
        draft = self.path.with_suffix(".new")
        draft.write_text("".join(lines))
        draft.replace(self.path)
        self.clock.now_s += 2

    async def knock(self, username=None, password=None, *, certificate=None, address=HOME):
        word = None if password is None else password.encode()
        outcome = self.doorkeeper.authenticate(Credentials("client", username, word, certificate, address))
        return outcome if isinstance(outcome, Identity | Refusal) else await outcome


@pytest.fixture
def door(tmp_path):
    return Door(tmp_path)


async def test_the_right_password_admits_and_everything_else_does_not(door):
    admitted = await door.knock("pump-1", "secret")
    assert isinstance(admitted, Identity)
    assert (admitted.name, admitted.client_id_scope) == ("pump-1", "pump-1")
    for name, word in (
        ("pump-1", "Secret"),
        ("pump-1", ""),
        ("pump-1", None),
        ("nobody", "secret"),
        ("", "x"),
    ):
        assert await door.knock(name, word, address=f"192.0.2.{len(name)}") == WRONG
    assert await door.knock() == NOT_AUTHORIZED
    assert await door.knock(None, "secret") == NOT_AUTHORIZED


async def test_a_device_costs_one_hash_however_often_it_comes_back(door):
    for _ in range(50):
        assert isinstance(await door.knock("pump-1", "secret"), Identity)
    assert door.doorkeeper.hashes_total == 1
    assert await door.knock("pump-1", "wrong") == WRONG
    assert door.doorkeeper.hashes_total == 2


async def test_a_device_that_comes_many_times_at_once_costs_one_hash_for_each_thread(door):
    outcomes = await asyncio.gather(*(door.knock("pump-1", "secret") for _ in range(200)))
    assert all(isinstance(outcome, Identity) for outcome in outcomes)
    assert door.doorkeeper.hashes_total <= max(1, (os.cpu_count() or 1) // 2)


async def test_an_unknown_name_costs_the_hash_of_a_device_always_the_same(tmp_path, monkeypatch):
    door = Door(tmp_path, [f"d{n}" for n in range(8)])
    compared: Counter[PasswordHash] = Counter()
    monkeypatch.setattr(
        doorkeeper_module,
        "verify_password",
        lambda stored, word: (compared.update([stored]), word == b"guess")[1],
    )
    for n in range(20):
        assert await door.knock("nobody", "guess", address=f"192.0.2.{n}") == WRONG
        assert await door.knock(f"other-{n}", "guess", address=f"198.51.100.{n}") == WRONG
    assert compared.total() == 40
    assert max(compared.values()) >= 20
    assert len(compared) > 1


async def test_a_removed_device_is_out_and_a_new_password_counts_at_once(door):
    first = await door.knock("pump-1", "secret")
    other = await door.knock("pump-2", "secret")
    assert first.still_valid()
    door.write(**{"pump-1": "another", "pump-2": "secret"})
    assert not first.still_valid()
    assert not other.still_valid()  # the same password with a new salt is a new line
    assert await door.knock("pump-1", "secret") == WRONG
    again = await door.knock("pump-1", "another")
    assert again.still_valid()
    door.write()
    assert not again.still_valid()
    assert await door.knock("pump-1", "another") == WRONG


async def test_a_file_that_makes_no_sense_for_a_moment_locks_nobody_out(door, caplog):
    admitted = await door.knock("pump-1", "secret")
    door.path.write_text("nonsense\n")
    door.clock.now_s += 2
    assert isinstance(await door.knock("pump-1", "secret"), Identity)
    assert isinstance(await door.knock("pump-2", "secret"), Identity)
    assert admitted.still_valid()
    door.path.unlink()
    door.clock.now_s += 2
    assert isinstance(await door.knock("pump-2", "secret"), Identity)
    assert ["stays in use" in r.message for r in caplog.records] == [True, True]


# Guessing


async def test_guessing_one_name_ends_after_a_few_tries_and_goes_on_slowly(door):
    outcomes = [await door.knock("pump-1", f"guess-{n}") for n in range(8)]
    assert outcomes == [WRONG] * 5 + [RATE] * 3
    hashes = door.doorkeeper.hashes_total
    assert hashes == 5
    assert await door.knock("pump-1", "secret") == RATE
    door.clock.now_s += 10
    assert isinstance(await door.knock("pump-1", "secret"), Identity)


async def test_a_device_with_a_wrong_password_does_not_lock_out_its_neighbours(door):
    for n in range(500):
        await door.knock("pump-1", f"guess-{n}")
    assert isinstance(await door.knock("pump-2", "secret"), Identity)
    assert isinstance(await door.knock("pump-1", "secret", address="192.0.2.99"), Identity)


async def test_guessing_many_names_from_one_address_ends_but_not_for_devices_known_to_be_right(door):
    assert isinstance(await door.knock("pump-2", "secret"), Identity)
    outcomes = [await door.knock(f"name-{n}", "guess") for n in range(150)]
    assert outcomes.count(WRONG) == 100
    assert outcomes[-50:] == [RATE] * 50
    assert await door.knock("pump-1", "secret") == RATE
    assert isinstance(await door.knock("pump-2", "secret"), Identity)
    assert isinstance(await door.knock("pump-1", "secret", address="192.0.2.2"), Identity)


async def test_all_addresses_of_one_ipv6_network_are_one(door):
    outcomes = [await door.knock("pump-1", "guess", address=f"2001:db8:0:1::{n:x}") for n in range(1, 8)]
    assert outcomes == [WRONG] * 5 + [RATE] * 2
    assert isinstance(await door.knock("pump-1", "secret", address="2001:db8:0:2::1"), Identity)


async def test_what_is_kept_of_guessers_is_bounded(door, monkeypatch):
    monkeypatch.setattr(doorkeeper_module, "verify_password", lambda *_: False)
    door.doorkeeper._failures_by_name = TokenBuckets(5, 0.1, max_keys=20)
    for n in range(100):
        await door.knock(f"name-{n}" * 1000, "guess", address=f"192.0.{n}.1")
    assert len(door.doorkeeper._failures_by_name) == 20
    assert door.doorkeeper._verified_digests == {}


async def test_refusals_are_logged_a_few_times_for_each_address(door, caplog):
    for n in range(50):
        await door.knock(f"name-{n}\n", "guess-secret")
    assert len(caplog.records) == 3
    assert "refused at 192.0.2.1: a wrong user name or password, for 'name-0\\n'" in caplog.text
    assert "guess-secret" not in caplog.text


# Certificates


@pytest.mark.parametrize(
    ("source", "shown", "name"),
    [
        ("cn", certificate("pump-1"), "pump-1"),
        ("cn", certificate("pump-1", "other"), "pump-1"),
        ("san", certificate("x", "pump-1"), "pump-1"),
        ("san", certificate("x"), None),
        ("san", certificate("x", "pump-1", "pump-2"), None),
        ("cn", {"subject": ()}, None),
        ("cn", {"subject": ((("commonName", "a"),), (("commonName", "b"),))}, None),
        ("cn", {"subject": ((("commonName", "a"), ("commonName", "b")),)}, None),
        ("cn", certificate("pump-1:flow"), None),
        ("cn", certificate("farm/pump-1"), None),
        ("cn", certificate(""), None),
    ],
)
def test_a_certificate_names_its_owner_once_or_not_at_all(source, shown, name):
    assert device_name_from_certificate(shown, source) == name


async def test_a_certificate_is_enough_where_no_password_is_asked_for(tmp_path):
    door = Door(tmp_path, (), identity="cn")
    admitted = await door.knock("whatever", "x", certificate=certificate("pump-1"))
    assert (admitted.name, admitted.may_publish(b"sensors/pump-1/t")) == ("pump-1", True)
    assert await door.knock(certificate=certificate("a:b")) == NOT_AUTHORIZED
    assert await door.knock("pump-1", "secret") == NOT_AUTHORIZED


async def test_where_either_will_do_a_client_shows_the_one_it_has(tmp_path):
    door = Door(tmp_path, identity="cn")
    assert (await door.knock(certificate=certificate("pump-9"))).name == "pump-9"
    assert (await door.knock("pump-1", "secret")).name == "pump-1"
    assert await door.knock("pump-1", "wrong") == WRONG


async def test_where_both_are_asked_for_they_must_belong_together(tmp_path):
    door = Door(tmp_path, identity="cn", require_password=True)
    mine = certificate("pump-1")
    assert (await door.knock("pump-1", "secret", certificate=mine)).name == "pump-1"
    for name, word in (("pump-1", "wrong"), ("pump-2", "secret"), (None, None)):
        assert await door.knock(name, word, certificate=mine) == WRONG


async def test_a_certificate_of_the_whole_fleet_leaves_the_name_to_the_password(tmp_path):
    door = Door(tmp_path, require_password=True)
    assert (await door.knock("pump-1", "secret", certificate=certificate("fleet"))).name == "pump-1"
    assert await door.knock("fleet", "secret", certificate=certificate("fleet")) == WRONG
    assert await door.knock(certificate=certificate("fleet")) == NOT_AUTHORIZED


# What may be published


@pytest.mark.parametrize(
    ("topic", "granted"),
    [
        (b"sensors/pump-1/t", True),
        (b"sensors/pump-1:flow/t", True),
        (b"sensors/pump-1:/t", True),
        (b"sensors/pump-10/t", False),
        (b"sensors/pump-1.flow/t", False),
        (b"sensors/pump/t", False),
        (b"sensors/pump-2:pump-1/t", False),
        (b"sensors/PUMP-1/t", False),
        (b"sensors//t", False),
        (b"sensors/pump-1/t/x", False),
        (b"other/pump-1/t", False),
        (b"sensors/pump-1", False),
        ("sensors/pump-1:å/t".encode(), True),
    ],
)
def test_a_device_owns_its_name_and_its_name_with_a_colon_and_more(topic, granted):
    assert allow_own_topics("pump-1", TEMPLATE)(topic) is granted


def test_nobody_in_particular_may_publish_what_no_device_owns():
    rule = allow_unregistered_topics(lambda: {"pump-1": 1}, TEMPLATE)
    assert not rule(b"sensors/pump-1/t")
    assert not rule(b"sensors/pump-1:flow/t")
    assert rule(b"sensors/pump-2/t")
    assert rule(b"anything")


async def test_publish_as_any_leaves_every_topic_open(tmp_path):
    door = Door(tmp_path, publish_as_self=False)
    assert (await door.knock("pump-1", "secret")).may_publish is None


async def test_those_who_show_nothing_are_admitted_where_that_is_said_but_own_no_device(tmp_path):
    door = Door(tmp_path, allow_anonymous=True)
    anyone = await door.knock()
    assert (anyone.name, anyone.client_id_scope) == ("client", "")
    assert not anyone.may_publish(b"sensors/pump-1/t")
    assert anyone.may_publish(b"sensors/new/t")
    assert await door.knock("pump-1", "wrong") == WRONG


def test_every_refusal_has_words_in_both_versions():
    codes = {
        ReasonCode.BAD_USER_NAME_OR_PASSWORD: 4,
        ReasonCode.NOT_AUTHORIZED: 5,
        ReasonCode.CONNECTION_RATE_EXCEEDED: 3,
    }
    for code, old in codes.items():
        assert build_refusal_connack(5, code) == Connack(code)
        assert build_refusal_connack(4, code) == Connack(old)

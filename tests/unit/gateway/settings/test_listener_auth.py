"""What a configuration of the listener means, and which ones are refused."""

import resource
from pathlib import Path

import pytest
from pydantic import ValidationError

from cloud_sync.runtime import server_sockets
from gateway.settings.listeners import Listen

P, CA = {"passwords_file": Path("p")}, {"client_ca_file": Path("ca.pem")}
TLS = {"tls_cert_file": Path("c.pem"), "tls_key_file": Path("k.pem")}
OPTIONAL, NET = {"client_certificate": "optional"}, {"host": "0.0.0.0"}


@pytest.mark.parametrize(
    ("keys", "anonymous", "named_by", "own_only"),
    [
        ({}, True, "username", False),
        ({"host": "::1"}, True, "username", False),
        ({"host": "localhost"}, True, "username", False),
        ({"host": "127.5.0.1"}, True, "username", False),
        ({**NET, "allow_anonymous": True}, True, "username", False),
        (P, False, "username", True),
        ({**NET, **P, **TLS}, False, "username", True),
        ({**NET, **P, "allow_plain_passwords": True}, False, "username", True),
        ({**P, "allow_anonymous": True}, True, "username", True),
        ({**P, "publish_as": "any"}, False, "username", False),
        ({**NET, **TLS, **CA}, False, "cn", True),
        ({**TLS, **CA, "identity": "san"}, False, "san", True),
        ({**TLS, **CA, **P}, False, "username", True),
        ({**TLS, **CA, **P, **OPTIONAL, "identity": "cn"}, False, "cn", True),
        ({**TLS, **CA, **OPTIONAL, "allow_anonymous": True, "publish_as": "any"}, True, "cn", False),
    ],
)
def test_what_is_not_said_follows_from_what_is(keys, anonymous, named_by, own_only):
    listen = Listen(**keys)
    assert (listen.allows_anonymous, listen.named_by, listen.own_only) == (anonymous, named_by, own_only)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (NET, "anyone who reaches 0.0.0.0 could publish anything: give passwords_file"),
        ({"host": ""}, "anyone who reaches this machine"),
        ({"host": "::"}, "allow_anonymous = true"),
        ({"host": "192.0.2.7"}, "or listen on 127.0.0.1"),
        ({"host": "gateway.example"}, "could publish anything"),
        ({**NET, **TLS}, "could publish anything"),
        ({"allow_anonymous": False}, "nobody could connect"),
        ({"tls_cert_file": Path("c")}, "go together"),
        ({**P, "tls_key_file": Path("k")}, "go together"),
        (CA, "client_ca_file needs TLS"),
        ({**NET, **P}, "passwords would cross the network readable on 0.0.0.0: give tls_cert_file"),
        ({**TLS, "client_crl_file": Path("l")}, "give that too"),
        ({"publish_as": "self"}, "nothing identifies a client"),
        ({**TLS, **CA, "identity": "username"}, "nothing identifies a client"),
        ({**P, "identity": "cn"}, "'cn' needs client_ca_file"),
        ({**TLS, **CA, **P, **OPTIONAL}, "change nothing"),
        ({**TLS, **CA, "allow_anonymous": True}, "contradict each other"),
        ({**TLS, **CA, **OPTIONAL, "allow_anonymous": True}, "could publish as any device that has one"),
    ],
)
def test_a_door_left_open_by_mistake_and_what_contradicts_itself_are_refused(keys, words):
    with pytest.raises(ValidationError) as told:
        Listen(**keys)
    assert words in str(told.value)


# File descriptors


@pytest.mark.parametrize(
    ("limits", "wanted", "raised_to", "affordable"),
    [
        ((1024, 524_288), 10_500, 10_756, 10_500),
        ((20_000, 20_000), 10_500, None, 10_500),
        ((1024, 4096), 10_500, 4096, 3840),
        ((1024, 1024), 10_500, 1024, 768),
        ((1024, -1), 10_500, 10_756, 10_500),
        ((-1, -1), 10_500, None, 10_500),
    ],
)
def test_the_limit_of_open_files_is_raised_to_what_is_needed(  # noqa: PLR0917 - fixtures and a row of the table
    monkeypatch, caplog, limits, wanted, raised_to, affordable
):
    now = {"limits": limits, "raised_to": None}

    def setrlimit(_which, new):
        now.update(limits=new, raised_to=new[0])

    monkeypatch.setattr(resource, "getrlimit", lambda _which: now["limits"])
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    assert server_sockets.raise_fd_limit(wanted) == affordable
    assert now["raised_to"] == raised_to
    assert ("LimitNOFILE" in caplog.text) is (affordable < wanted)


def test_a_sandbox_that_forbids_to_raise_the_limit_leaves_fewer_connections(monkeypatch, caplog):
    def setrlimit(*_):
        raise PermissionError

    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1024, 524_288))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    assert server_sockets.raise_fd_limit(10_500) == 768
    assert "at most 768 connections are accepted" in caplog.text

"""The doctor's checks of machine, files and ports: each finds the fault it is there for."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gateway.doctor import Level, machine, network
from gateway.processing.clock import (
    RELEASE_TIME_US,
    ClockSources,
    GatewayClock,
    SyncStatus,
    read_kernel_sync,
)
from gateway.settings import gateway_settings
from gateway.settings.gateway_settings import SpoolSettings
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from gateway.doctor import Finding

NOW_S = 1_790_000_000.0


def mounted(point: Path | str, kind: str = "ext4", options: str = "rw,noatime", device: str = "179:2") -> str:
    return (
        "22 1 8:1 / / rw - ext4 /dev/root rw\n"
        f"36 22 {device} / {str(point).replace(' ', chr(92) + '040')} {options} shared:1 - {kind} /dev/x rw\n"
    )


def told(findings: list[Finding]) -> list[tuple[str, str]]:
    assert all(f.advice for f in findings if f.level is not Level.OK), "a fault without a word on what to do"
    return [(f.level, f.what) for f in findings]


def worst(findings: list[Finding]) -> Finding:
    told(findings)
    return max(findings, key=lambda f: list(Level).index(f.level))


@pytest.mark.parametrize(
    ("now_s", "synchronised", "newest_s", "level", "words"),
    [
        (NOW_S, True, NOW_S - 5, Level.OK, "is synchronised"),
        (NOW_S, None, None, Level.OK, "is unknown"),
        (12.0, True, None, Level.FAULT, "before this release"),
        (NOW_S, True, NOW_S + 7200, Level.FAULT, "2 h 0 min behind the newest commit"),
        (NOW_S, False, NOW_S, Level.WARNING, "not synchronised"),
        (RELEASE_TIME_US / 1e6 - 60, True, None, Level.FAULT, "before this release"),
        (NOW_S, None, NOW_S + 60, Level.FAULT, "behind the newest commit"),
    ],
)
def test_a_clock_that_cannot_be_right_is_found(now_s, synchronised, newest_s, level, words):
    (found,) = machine.check_clock(now_s, synchronised=synchronised, newest_s=newest_s)
    assert (found.level, words in found.what) == (level, True), found


def test_the_kernel_is_asked_whether_the_clock_is_synchronised():
    assert read_kernel_sync() in (True, False, None)


@pytest.mark.parametrize("ahead_s", [-3600, -60, 60, 3600])
def test_the_doctor_and_the_agent_agree_on_a_clock_that_is_certainly_wrong(ahead_s):
    wall_us = RELEASE_TIME_US + ahead_s * 1_000_000
    sources = ClockSources(wall_us=lambda: wall_us, boot_us=lambda: 0, sync=lambda: SyncStatus.YES)
    (found,) = machine.check_clock(wall_us / 1e6, synchronised=True, newest_s=None)
    assert (found.level is Level.OK) == GatewayClock(0, sources=sources).trusted


@pytest.mark.parametrize(
    ("kind", "options", "level", "words"),
    [
        ("ext4", "rw", Level.OK, "are free"),
        ("nfs4", "rw", Level.FAULT, "network file system (nfs4)"),
        ("tmpfs", "rw", Level.WARNING, "may be lost at a restart"),
        ("exfat", "rw", Level.WARNING, "a power cut can damage"),
        ("ext4", "ro,relatime", Level.FAULT, "mounted read-only"),
    ],
)
def test_a_disk_that_does_not_keep_what_it_is_told_is_found(tmp_path, kind, options, level, words):
    folder = tmp_path / "with space"
    folder.mkdir()
    found = worst(machine.check_disk(spool(folder, min_free_bytes=0), mounted(folder, kind, options)))
    assert (found.level, words in found.what) == (level, True), found


def spool(folder: Path, **keys: Any) -> SpoolSettings:
    return SpoolSettings(path=folder / "new" / "spool.db", **keys)


def test_a_disk_without_room_is_found_and_a_cap_that_it_cannot_hold(tmp_path):
    full = worst(machine.check_disk(spool(tmp_path, min_free_bytes=1 << 60), ""))
    assert (full.level, "acknowledgements are withheld" in full.what) == (Level.FAULT, True)
    findings = machine.check_disk(spool(tmp_path, min_free_bytes=0, max_bytes=1 << 60), "")
    assert "more than the disk can hold" in worst(findings).what


def flash(folder: Path, **files_: str) -> Path:
    """A /sys with one disk, mmcblk0, and its second partition."""
    device = folder / "devices" / "mmcblk0"
    (device / "mmcblk0p2").mkdir(parents=True)
    (device / "mmcblk0p2" / "partition").write_text("2\n")
    (device / "device").mkdir()
    for name, text in files_.items():
        (device / "device" / name).write_text(text + "\n")
    (folder / "dev" / "block").mkdir(parents=True)
    (folder / "dev" / "block" / "179:2").symlink_to(device / "mmcblk0p2")
    return folder


@pytest.mark.parametrize(
    ("device", "level", "words"),
    [
        ({"life_time": "0x02 0x01", "pre_eol_info": "0x01", "type": "MMC"}, Level.OK, "at most 20 %"),
        ({"life_time": "0x01 0x09", "pre_eol_info": "0x01"}, Level.WARNING, "80 to 90 %"),
        ({"life_time": "0x0B 0x01"}, Level.FAULT, "exceeded its estimated life"),
        ({"life_time": "0x01 0x01", "pre_eol_info": "0x03"}, Level.FAULT, "90 % of the reserve"),
        ({"type": "SD"}, Level.WARNING, "an SD card, with a commit every 5 ms"),
    ],
)
def test_worn_flash_is_found(tmp_path, device, level, words):
    sys = flash(tmp_path / "sys", **device)
    found = worst(machine.check_flash(spool(tmp_path), mounted(tmp_path), sys))
    assert (found.level, words in found.what) == (level, True), found


def test_a_disk_that_is_no_flash_or_not_known_has_nothing_to_say(tmp_path):
    assert machine.check_flash(spool(tmp_path), mounted(tmp_path), tmp_path) == []
    assert machine.check_flash(spool(tmp_path), "", tmp_path) == []


def site(folder: Path, **tables: Any) -> gateway_settings.GatewaySettings:
    return gateway_settings.GatewaySettings(
        **{"gateway_id": "g", "spool": {"path": folder / "spool.db"}, **tables}
    )


def ingest(folder: Path, **keys: Any) -> dict[str, Any]:
    table = {"kind": "ingest", "name": "r", "url": "https://region", "token_file": folder / "token"}
    return {"destinations": [{**table, **keys}]}


@pytest.mark.parametrize(
    ("mode", "level", "words"),
    [
        (0o600, Level.OK, "only its owner and group"),
        (0o640, Level.OK, "only its owner and group"),
        (0o644, Level.WARNING, "everybody may read it"),
        (0o660, Level.WARNING, "its group may change it"),
        (None, Level.FAULT, "destinations[r].token_file names a file that does not exist"),
    ],
)
def test_a_secret_that_others_can_read_or_that_is_missing_is_found(tmp_path, mode, level, words):
    if mode is not None:
        (tmp_path / "token").write_text("x")
        (tmp_path / "token").chmod(mode)
    (found,) = machine.check_secrets(site(tmp_path, **ingest(tmp_path)))
    assert (found.level, words in found.what) == (level, True), found


def test_a_configuration_that_everybody_may_change_is_found(tmp_path):
    path = tmp_path / "gateway.toml"
    path.touch()
    assert worst(machine.check_config_permissions(path)).level is Level.OK
    path.chmod(0o666)
    assert worst(machine.check_config_permissions(path)).level is Level.FAULT
    path.chmod(0o644)
    tmp_path.chmod(0o777)
    assert worst(machine.check_config_permissions(path)).subject == str(tmp_path)


def test_a_stick_that_is_not_there_is_found(tmp_path):
    stick = {"kind": "file", "name": "s", "directory": tmp_path / "stick", "create": False}
    given = site(tmp_path, destinations=[stick])
    assert "does not exist" in worst(machine.check_folders(given, as_service=True)).what
    (tmp_path / "stick").mkdir()
    assert worst(machine.check_folders(given, as_service=True)).level is Level.OK


def test_a_folder_that_the_service_may_not_write_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)  # root may write everywhere
    assert "is not writable" in worst(machine.check_folders(site(tmp_path), as_service=True)).what
    assert worst(machine.check_folders(site(tmp_path), as_service=False)).level is Level.OK


def test_certificates_that_end_soon_have_ended_or_do_not_fit_are_found(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server", "localhost")  # for two days
    _, other_key = authority.issue("other", "localhost")
    listen = {"tls_cert_file": certificate, "tls_key_file": key}
    now_s = time.time()

    def found(listen: dict[str, Path], at_s: float) -> Finding:
        given = site(tmp_path, ingress={"listen": {**listen, "passwords_file": tmp_path / "p"}})
        return worst(machine.check_certificates(given, at_s))

    assert (found(listen, now_s).level, "expires in 2 days" in found(listen, now_s).what) == (
        Level.FAULT,
        True,
    )
    assert found(listen, now_s - 12 * 86_400).level is Level.FAULT  # not valid yet
    assert "is the clock right" in found(listen, now_s - 12 * 86_400).what
    assert "expired 3 days ago" in found(listen, now_s + 5 * 86_400).what
    (fault,) = [
        f
        for f in machine.check_certificates(
            site(tmp_path, ingress={"listen": {**listen, "tls_key_file": other_key}}), now_s
        )
        if "is not the key of" in f.what
    ]
    assert fault.level is Level.FAULT
    certificate.write_text("no certificate")
    assert (
        "contains no PEM certificate"
        in worst(machine.check_certificates(site(tmp_path, ingress={"listen": listen}), now_s)[:1]).what
    )


async def test_a_port_that_is_taken_or_not_this_machines_is_found_and_the_gateways_own_is_well():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = ("ingress.listen", "127.0.0.1", port)
        assert "in use" in network.check_port(*given, None, "g").what
        assert network.check_port(*given, "g", "g").level is Level.OK
        assert "in use by gateway other" in network.check_port(*given, "other", "g").what
    assert network.check_port(*given, None, "g").level is Level.OK
    assert "nothing listens" in network.check_port(*given, "g", "g").what
    away = network.check_port("status", "192.0.2.7", port, None, "g")
    assert (away.level, "no such address" in away.advice) == (Level.FAULT, True)


async def test_a_name_that_nobody_knows_is_found():
    assert (await network.check_name("nobody.invalid", "destination r")).level is Level.FAULT
    assert (await network.check_name("127.0.0.1", "destination r")).level is Level.OK


def test_secrets_and_certificates_of_the_endpoint_and_of_channels_are_looked_at(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text(
        'gateway_id = "g"\n[spool]\npath = "s"\n'
        '[status]\ntls_cert_file = "server.pem"\ntls_key_file = "server.key"\ntokens_file = "tokens"\n'
        '[[alerts.channel]]\nname = "ops"\nkind = "webhook"\nurl_file = "ops.url"\nca_file = "ops-ca.pem"\n'
        '[[alerts.channel]]\nname = "mail"\nkind = "email"\nhost = "h"\nusername = "u"\n'
        'password_file = "mail.password"\nsender = "a@b.example"\nto = ["c@d.example"]\n'
    )
    (tmp_path / "ops.url").write_text("https://chat.example/hook\n")
    (tmp_path / "ops.url").chmod(0o644)
    given = gateway_settings.parse_settings_file(config)
    secrets = {f.what.partition(": ")[0].partition(" names")[0] for f in machine.check_secrets(given)}
    assert secrets >= {"status.tls_key_file", "status.tokens_file", "alerts.channel[mail].password_file"}
    assert any(
        f.subject.endswith("ops.url") and f.level is Level.WARNING for f in machine.check_secrets(given)
    )
    found = machine.check_certificates(given, NOW_S)
    faults = {Path(f.subject).name for f in found if f.level is Level.FAULT}
    assert faults >= {"server.pem", "ops-ca.pem"}

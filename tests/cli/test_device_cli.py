"""`tidegate device`: a person's way to the password file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.auth.device_passwords import read_password_file, verify_password

ROOT = Path(__file__).parents[2]


def tidegate(*arguments, stdin=""):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    return subprocess.run(
        [sys.executable, "-m", "gateway", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=environment,
    )


def device(*arguments, stdin=""):
    return tidegate("device", *arguments, stdin=stdin)


@pytest.fixture
def config(tmp_path):
    """A configuration that names a password file which is not there yet."""
    path = tmp_path / "gateway.toml"
    path.write_text(
        'gateway_id = "g"\n[spool]\npath = "spool.db"\n'
        '[ingress.listen]\nhost = "0.0.0.0"\npasswords_file = "passwords"\nallow_plain_passwords = true\n'
    )
    return path


def test_from_nothing_to_a_device_that_may_connect(config):
    path = config.parent / "passwords"
    missing = tidegate("config", "check", config)
    assert missing.returncode == 2
    assert (
        f"ingress.listen.passwords_file: {path}: there is no such file; `tidegate device add"
        in missing.stderr
    )
    added = device("add", "pump-1", "--config", config)
    assert (added.returncode, added.stderr) == (0, "")
    assert verify_password(read_password_file(path)["pump-1"], added.stdout.strip().encode())
    assert added.stdout.strip() not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    checked = tidegate("config", "check", config)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_password_from_standard_input_is_not_shown_and_can_be_checked(config):
    added = device("add", "pump-1", "-c", config, "--password-stdin", stdin="a phrase of mine\nmore\n")
    assert (added.returncode, added.stdout) == (0, "")
    right = device("check", "pump-1", "-c", config, "--password-stdin", stdin="a phrase of mine\n")
    assert (right.returncode, right.stdout) == (0, "pump-1: the password is right\n")
    wrong = device("check", "pump-1", "-c", config, "--password-stdin", stdin="another phrase\n")
    assert (wrong.returncode, wrong.stdout) == (1, "pump-1: wrong password\n")
    unknown = device("check", "pump-2", "-c", config)
    assert unknown.returncode == 1
    assert unknown.stdout.startswith("pump-2: not in ")


def test_devices_are_listed_and_removed(tmp_path):
    path = tmp_path / "p"
    path.write_text("# pumps\n")
    for name in ("b", "a"):
        assert device("add", name, "--passwords-file", path).returncode == 0
    assert device("list", "--passwords-file", path).stdout == "b\na\n"
    assert device("remove", "b", "--passwords-file", path).returncode == 0
    again = device("remove", "b", "--passwords-file", path)
    assert (again.returncode, again.stderr) == (1, f"tidegate: b is not in {path}\n")
    assert device("list", "--passwords-file", path).stdout == "a\n"
    assert path.read_text().startswith("# pumps\na:scrypt$")


def test_every_answer_can_be_had_as_json(tmp_path):
    path = tmp_path / "p"
    named = ("--passwords-file", path, "--json")
    added = json.loads(device("add", "a", *named).stdout)
    assert verify_password(read_password_file(path)["a"], added["password"].encode())
    where = {"passwords_file": str(path)}
    chosen = device("add", "b", *named, "--password-stdin", stdin="a phrase of mine\n")
    assert json.loads(chosen.stdout) == {**where, "name": "b", "password": None}
    assert json.loads(device("list", *named).stdout) == {**where, "devices": ["a", "b"]}
    known = json.loads(device("check", "a", *named).stdout)
    assert known == {**where, "name": "a", "known": True, "password_right": None}
    assert json.loads(device("remove", "c", *named).stdout) == {**where, "name": "c", "removed": False}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "a"), "name the file: --config FILE or --passwords-file FILE"),
        (("add", "a b", "--passwords-file", "{}"), "'a b': a device's name is without space"),
        (("add", "old", "--passwords-file", "{}"), "old is there already; --replace gives it a new password"),
        (
            ("add", "a", "--passwords-file", "{}", "--password-stdin"),
            "expected the password on the first line",
        ),
        (("list", "--passwords-file", "{}x"), "there is no such file; `tidegate device add NAME"),
        (("add", "a", "--passwords-file", "/proc/version"), "/proc/version: line 1: "),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(tmp_path, arguments, words):
    path = tmp_path / "p"
    device("add", "old", "--passwords-file", path)
    outcome = device(*(argument.replace("{}", str(path)) for argument in arguments))
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert words in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_a_configuration_without_a_password_file_says_what_to_write(tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_text('gateway_id = "g"\n[spool]\npath = "spool.db"\n')
    outcome = device("list", "-c", path)
    assert outcome.returncode == 2
    assert 'passwords_file is not set; add for instance passwords_file = "passwords"' in outcome.stderr


def test_a_configuration_that_leaves_the_door_open_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_text('gateway_id = "g"\n[spool]\npath = "spool.db"\n[ingress.listen]\nhost = "0.0.0.0"\n')
    outcome = tidegate("config", "check", path)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(
        f"tidegate: {path}: ingress.listen: anyone who reaches 0.0.0.0 could publish"
    )
    assert "Traceback" not in outcome.stderr


def test_certificates_that_are_of_no_use_are_named_with_their_key(tmp_path):
    path = tmp_path / "gateway.toml"
    (tmp_path / "c.pem").write_text("no certificate\n")
    (tmp_path / "k.pem").write_text("no key\n")
    listen = '[ingress.listen]\ntls_cert_file = "c.pem"\ntls_key_file = "{}"\n'
    for key, words in (
        ("k.pem", f"ingress.listen.tls_cert_file: {tmp_path / 'c.pem'}: is no PEM certificate"),
        (
            "absent.pem",
            f"ingress.listen.tls_key_file: {tmp_path / 'absent.pem'}: cannot be read: No such file",
        ),
    ):
        path.write_text('gateway_id = "g"\n[spool]\npath = "spool.db"\n' + listen.format(key))
        outcome = tidegate("config", "check", path)
        assert outcome.returncode == 2
        assert words in outcome.stderr

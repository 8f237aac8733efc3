"""The password file: its form, its hashes, changes that keep what a person wrote."""

import os
import threading

import pytest

from gateway.auth import device_passwords
from gateway.auth.device_passwords import (
    PasswordFileError,
    add_device,
    find_device_name_fault,
    hash_password,
    parse_password_file,
    read_password_file,
    remove_device,
    verify_password,
)

LN = 4


def line(name, password=b"secret"):
    return f"{name}:{hash_password(password, ln=LN)}\n"


def test_a_password_matches_its_hash_and_no_other_does():
    stored = hash_password(b"correct horse", ln=LN)
    assert verify_password(stored, b"correct horse")
    assert not verify_password(stored, b"correct horsf")
    assert not verify_password(stored, b"")


def test_the_hash_is_the_scrypt_of_rfc_7914():
    stored = hash_password(b"pleaseletmein", ln=14, salt=b"SodiumChloride")
    assert stored.key.hex() == "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"


def test_equal_passwords_have_different_hashes():
    assert hash_password(b"secret", ln=LN) != hash_password(b"secret", ln=LN)


def test_a_file_is_read_back_as_it_was_written():
    stored = hash_password("päss".encode(), ln=LN)
    devices = parse_password_file(f"# pumps\n\n  \npump-1:{stored}\nhall_3.t:{stored}\n", "f")
    assert devices == {"pump-1": stored, "hall_3.t": stored}
    assert verify_password(devices["pump-1"], "päss".encode())


BAD_LINES = [
    ("pump-1\n", "line 1: expected pump-1:scrypt"),
    ("# c\npump-1:plain\n", "line 2: expected"),
    ("pump 1:x\n", "line 1: a device's name is without space"),
    (":x\n", "line 1: a device's name has 1 to"),
    (line("a") + line("a"), "line 2: a has a line already"),
    (line("a").replace("ln=4", "ln=0"), "a cost of 0"),
    (line("a").replace("ln=4", "ln=30"), "is over"),
    (line("a").replace("ln=4,r=8", "ln=14,r=99"), "is over"),
    (line("a").replace("p=1", "p=99").replace("ln=4", "ln=16"), "is over"),
    (line("a").replace("scrypt", "argon2"), "not of this form"),
    ("a:scrypt$ln=4,r=8,p=1$AAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAA\n", "not base64"),
]


@pytest.mark.parametrize(("text", "words"), BAD_LINES, ids=[words for _, words in BAD_LINES])
def test_a_line_that_makes_no_sense_is_told_with_its_number(text, words):
    with pytest.raises(PasswordFileError, match=r"^f: line") as told:
        parse_password_file(text, "f")
    assert words in str(told.value)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("name", ["", "a:b", "a/b", "a b", "a+", "#", "a\n", "a\x00", "x" * 257, "a\x85"])
def test_a_name_that_is_no_level_of_a_topic_or_holds_a_colon_is_none(name):
    assert find_device_name_fault(name) is not None


@pytest.mark.parametrize("name", ["pump-1", "hålla", "x" * 256, "a.b_c", "$x", "温度"])
def test_other_names_are_names(name):
    assert find_device_name_fault(name) is None


def test_adding_keeps_comments_order_and_the_other_lines(tmp_path):
    path = tmp_path / "passwords"
    path.write_text(f"# barn\n{line('a')}\n# hall\n{line('b')}")
    before = path.read_text()
    password = add_device(path, "c")
    assert path.read_text().startswith(before)
    assert verify_password(read_password_file(path)["c"], password.encode())
    add_device(path, "a", replace=True)
    assert [text[:6] for text in path.read_text().splitlines()] == [
        "# barn",
        "a:scry",
        "",
        "# hall",
        "b:scry",
        "c:scry",
    ]
    assert remove_device(path, "b")
    assert list(read_password_file(path)) == ["a", "c"]
    assert path.read_text().startswith("# barn\na:")


def test_a_device_that_is_there_keeps_its_password_unless_it_is_to_be_replaced(tmp_path):
    path = tmp_path / "passwords"
    first = add_device(path, "a")
    with pytest.raises(PasswordFileError, match="--replace"):
        add_device(path, "a")
    assert verify_password(read_password_file(path)["a"], first.encode())


def test_generated_passwords_are_long_and_different_and_chosen_ones_cost_more(tmp_path):
    path = tmp_path / "passwords"
    generated = {add_device(path, f"d{n}") for n in range(5)}
    assert len(generated) == 5
    assert min(map(len, generated)) >= 27
    add_device(path, "chosen", "a phrase of a person")
    devices = read_password_file(path)
    assert (
        devices["d0"].ln
        == device_passwords.COST_GENERATED
        < devices["chosen"].ln
        == device_passwords.COST_CHOSEN
    )
    with pytest.raises(PasswordFileError, match="at least 12"):
        add_device(path, "short", "12345678901")


def test_a_new_file_is_for_its_owner_only_and_an_old_one_keeps_its_group_but_no_others(tmp_path):
    path = tmp_path / "passwords"
    add_device(path, "a")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    add_device(path, "b")
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["passwords"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_writes_belongs_to_whom_the_service_runs_as(tmp_path):
    path = tmp_path / "passwords"
    os.chown(tmp_path, 12345, 12346)
    add_device(path, "a")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12346)
    os.chown(path, 12347, 12348)
    remove_device(path, "a")
    assert (path.stat().st_uid, path.stat().st_gid) == (12347, 12348)


def test_changes_at_the_same_time_are_all_made(tmp_path):
    path = tmp_path / "passwords"
    threads = [threading.Thread(target=add_device, args=(path, f"d{n}")) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read_password_file(path)) == sorted(f"d{n}" for n in range(12))


def test_a_file_that_is_not_there_or_not_writable_is_named(tmp_path):
    with pytest.raises(PasswordFileError, match=r"there is no such file; `tidegate device add"):
        read_password_file(tmp_path / "absent")
    with pytest.raises(PasswordFileError, match="its folder cannot be opened"):
        add_device(tmp_path / "nowhere" / "passwords", "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PasswordFileError, match="cannot be read: Is a directory"):
        add_device(tmp_path / "folder", "a")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(PasswordFileError, match="cannot be read"):
        read_password_file(tmp_path / "binary")


def test_a_file_with_a_faulty_line_is_not_changed(tmp_path):
    path = tmp_path / "passwords"
    path.write_text("a:plain\n")
    with pytest.raises(PasswordFileError, match="line 1"):
        add_device(path, "b")
    assert path.read_text() == "a:plain\n"

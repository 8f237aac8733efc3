"""The file of tokens."""

from __future__ import annotations

import hashlib
import stat

import pytest

from cloud_sync.http import tokens


def owner(file: tokens.TokenFile, token: str) -> str | None:
    entry = file.find_entry(token)
    return entry.name if entry else None


def test_a_token_that_was_added_is_known_and_only_its_hash_is_kept(tmp_path):
    path = tmp_path / "tokens"
    first, second, other = (tokens.add_token(path, gateway) for gateway in ("gw-1", "gw-1", "gw-2"))
    text = path.read_text()

    assert len({first, second, other}) == 3
    assert not any(token in text for token in (first, second, other))
    assert hashlib.sha256(first.encode()).hexdigest() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    file = tokens.TokenFile(path)
    assert len(file) == 3
    assert [owner(file, token) for token in (first, second, other, "", "x")] == [
        "gw-1",
        "gw-1",
        "gw-2",
        None,
        None,
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens"]


def test_revoking_takes_every_token_of_a_gateway(tmp_path):
    path = tmp_path / "tokens"
    gone = [tokens.add_token(path, "gw-1") for _ in range(2)]
    kept = tokens.add_token(path, "gw-2")
    file = tokens.TokenFile(path)

    assert tokens.revoke_tokens(path, "gw-1") == 2
    assert tokens.revoke_tokens(path, "gw-1") == 0

    assert len(file) == 1
    assert [owner(file, token) for token in (*gone, kept)] == [None, None, "gw-2"]


def test_comments_and_blank_lines_are_allowed_and_nonsense_is_named_by_line():
    good = "0" * 64
    text = f"# a comment\n\n gw-1   {good}  # north\n"
    assert tokens.parse_tokens(text, "f") == [("gw-1", good, "batches")]
    assert tokens.parse_tokens(f"a {good} readings\nb {good} view", "f")[1].scope == "view"
    for line in ("gw-1", f"gw-1 {good}0", f"gw-1 {good} extra", "gw-1 " + "g" * 64):
        with pytest.raises(tokens.TokenFileError, match="f: line 2: expected"):
            tokens.parse_tokens(f"# x\n{line}\n", "f")


@pytest.mark.parametrize("gateway", ["", "a b", "a#b", "a/b", "a\n", "x" * 129])
def test_a_gateway_id_that_the_file_cannot_hold_is_refused(tmp_path, gateway):
    with pytest.raises(tokens.TokenFileError, match="no gateway_id"):
        tokens.add_token(tmp_path / "tokens", gateway)


def test_a_file_that_goes_bad_leaves_the_tokens_read_before_in_force(tmp_path, caplog):
    path = tmp_path / "tokens"
    token = tokens.add_token(path, "gw-1")
    file = tokens.TokenFile(path)
    path.write_text("nonsense")
    assert owner(file, token) == "gw-1"
    assert "line 1" in caplog.text
    path.unlink()
    assert owner(file, token) == "gw-1"
    assert owner(file, token) == "gw-1"
    assert caplog.text.count("there is no such file") == 1


def test_a_file_that_is_not_there_at_the_start_is_an_error_that_names_the_command(tmp_path):
    with pytest.raises(tokens.TokenFileError, match="create it with `tidegate x`"):
        tokens.TokenFile(tmp_path / "tokens", "tidegate x")

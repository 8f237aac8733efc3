"""A secret is read where systemd handed it over, and at its own path everywhere else."""

from __future__ import annotations

from pathlib import Path

from cloud_sync.runtime.secret_files import find_credential


def test_a_secret_is_found_among_the_credentials_under_the_path_of_the_configuration(tmp_path):
    (tmp_path / "secret_regional.token").touch()
    (tmp_path / "dsn").touch()
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    secrets = Path("/etc/tidegate/secrets")
    assert find_credential(secrets / "regional.token", environ) == tmp_path / "secret_regional.token"
    assert find_credential(Path("/etc/tidegate/dsn"), environ) == tmp_path / "dsn"
    assert find_credential(secrets / "other.token", environ) == secrets / "other.token"
    assert find_credential(tmp_path / "dsn", environ) == tmp_path / "dsn"
    assert find_credential(secrets / "regional.token", {}) == secrets / "regional.token"

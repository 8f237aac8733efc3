"""A secret is read where systemd handed it over, and at its own path everywhere else."""

from __future__ import annotations

from pathlib import Path

from cloud_sync.handed_over import handed_over


def test_a_secret_is_found_among_the_credentials_under_the_path_of_the_configuration(tmp_path):
    (tmp_path / "secret_regional.token").touch()
    (tmp_path / "dsn").touch()
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    secrets = Path("/etc/tidegate/secrets")
    assert handed_over(secrets / "regional.token", environ) == tmp_path / "secret_regional.token"
    assert handed_over(Path("/etc/tidegate/dsn"), environ) == tmp_path / "dsn"
    assert handed_over(secrets / "other.token", environ) == secrets / "other.token"
    assert handed_over(tmp_path / "dsn", environ) == tmp_path / "dsn"
    assert handed_over(secrets / "regional.token", {}) == secrets / "regional.token"

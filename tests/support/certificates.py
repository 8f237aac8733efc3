"""A private authority that gives servers and devices their certificates, and revokes them, by openssl."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_CA_CONFIG = """
[ca]
default_ca = it
[it]
database = {name}-index.txt
default_md = sha256
default_crl_days = 2
"""


class Authority:
    """Files `NAME.pem` and `NAME.key` in a folder, signed by `CA.pem`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.name = name
        subject = f"/CN=Authority {name}"
        self._run("req", "-x509", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", subject)
        (folder / f"{name}.cnf").write_text(_CA_CONFIG.format(name=name))
        (folder / f"{name}-index.txt").touch()

    @property
    def certificate(self) -> Path:
        return self.folder / f"{self.name}.pem"

    def issue(self, name: str, common_name: str, alternative: str = "") -> tuple[Path, Path]:
        """A certificate and its key; `alternative` such as "DNS:pump-1"."""
        extension = self.folder / f"{name}.ext"
        extension.write_text(f"subjectAltName={alternative}\n" if alternative else "")
        self._run(
            "req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={common_name}"
        )
        self._run(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", f"{self.name}.pem", "-CAkey", f"{self.name}.key"),
            *("-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", extension.name),
        )
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def revocations(self, *revoked: str) -> Path:
        """A list that revokes certificates by the names of their files."""
        mine = ("-config", f"{self.name}.cnf", "-cert", f"{self.name}.pem", "-keyfile", f"{self.name}.key")
        for name in revoked:
            self._run("ca", *mine, "-revoke", f"{name}.pem")
        self._run("ca", *mine, "-gencrl", "-out", f"{self.name}-crl.pem")
        return self.folder / f"{self.name}-crl.pem"

    def _run(self, *words: str) -> None:
        openssl = shutil.which("openssl")
        if openssl is None:
            pytest.skip("needs openssl (Debian package openssl)")
        subprocess.run([openssl, *words], cwd=self.folder, check=True, capture_output=True, timeout=60)

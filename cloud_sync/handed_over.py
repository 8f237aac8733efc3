"""Secrets that systemd hands over (`LoadCredential=`), found under the path that the configuration gives.

A service cannot read /etc/tidegate/secrets; it finds `secrets/regional.token` as the file
`secret_regional.token` of its credentials directory, and `dsn` as `dsn`. Everybody else, such as
`tidegate config check` run by root, reads the path itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def handed_over(path: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Where a secret's file is to be read: among the credentials when it is there, else at its own path."""
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    if folder and not path.is_relative_to(folder):
        for name in (f"{path.parent.name.removesuffix('s')}_{path.name}", path.name):
            given = Path(folder) / name
            if given.is_file():
                return given
    return path

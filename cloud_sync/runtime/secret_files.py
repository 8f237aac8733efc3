"""Secrets: where their files are, how they are read, and how text is shown without them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

MASK: Final = "***"
_USERINFO = re.compile(r"(?<=://)[^/@\s'\"]*@")
_QUERY_SECRET = re.compile(r"(?i)([?&;][^=&\s]*(?:token|secret|passw|key|auth|sig)[^=&\s]*=)[^&\s'\"]+")


def redact_text(text: str) -> str:
    """Text without the user and password of addresses in it, and without secrets in their queries."""
    return _QUERY_SECRET.sub(rf"\1{MASK}", _USERINFO.sub(f"{MASK}@", text))


def find_credential(path: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """The file that systemd gave for a secret (`LoadCredential=`), or `path` when it gave none."""
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    if folder and not path.is_relative_to(folder):
        for name in (f"{path.parent.name.removesuffix('s')}_{path.name}", path.name):
            given = Path(folder) / name
            if given.is_file():
                return given
    return path


def read_secret(path: Path | None) -> str:
    """The first line of a file, "" without one; OSError or UnicodeDecodeError when it cannot be read."""
    return "" if path is None else path.read_text(encoding="utf-8").partition("\n")[0].strip()

"""Text for people without the secrets that an address may carry. Pure."""

from __future__ import annotations

import re
from typing import Final

MASK: Final = "***"
_USERINFO = re.compile(r"(?<=://)[^/@\s'\"]*@")
_QUERY_SECRET = re.compile(r"(?i)([?&;][^=&\s]*(?:token|secret|passw|key|auth|sig)[^=&\s]*=)[^&\s'\"]+")


def masked_text(text: str) -> str:
    """Text without the user and password of addresses in it, and without tokens in their queries."""
    return _QUERY_SECRET.sub(rf"\1{MASK}", _USERINFO.sub(f"{MASK}@", text))

"""The OpenAPI description of the service. Pure. docs/wire-format.md says the same in words."""

from __future__ import annotations

from typing import Any


def description() -> dict[str, Any]:
    return {}

"""Readings over HTTP. Its modules bring a web server; what the status needs of it stands here."""

from __future__ import annotations

import msgspec


class HttpStatus(msgspec.Struct, frozen=True):
    """The gateway's own HTTP server since start; `batches_again` were repeated deliveries."""

    requests: int
    batches: int
    batches_again: int
    rejections: dict[str, int]

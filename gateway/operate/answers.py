"""What the endpoint answers with, and how much of a request it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.requests import Request

SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}
"""Headers of every answer."""


def json_answer(content: object, status: int = 200) -> Response:
    """A document as JSON, not to be kept by anyone on the way."""
    return Response(
        msgspec.json.encode(content),
        status,
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )


def refusal() -> Response:
    """For whoever may not look."""
    answer = json_answer(
        {
            "error": "unauthorised",
            "message": "from another machine this takes a token of [status] tokens_file, as a bearer",
        },
        401,
    )
    answer.headers["www-authenticate"] = "Bearer"
    return answer


async def bounded_body(request: Request, most_bytes: int) -> bytes | None:
    """The body of a request, None when it is larger; no more than that is ever in memory."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most_bytes:
            return None
    return bytes(body)

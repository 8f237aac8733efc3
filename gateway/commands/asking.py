"""How a command has the gateway that holds a spool do what only the spool's one writer may do."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import httpx
import msgspec

from gateway.operate.own_endpoint import own_client, own_url
from gateway.spool.errors import SpoolInUse

if TYPE_CHECKING:
    from gateway.commands.spool_options import Named

T = TypeVar("T")
_WITHIN_S = 3600.0


def ask_gateway(which: Named, path: str, body: object, answer: type[T], fault: SpoolInUse) -> T:
    """POST `body` to the running gateway's own endpoint; `fault` is why it has to be asked.

    Raises:
        SpoolInUse: it is not known where the gateway listens, or it does not answer there.
    """
    if which.settings is None or not which.settings.status.enabled:
        raise SpoolInUse(
            f"{fault}. Only the gateway writes to its spool: name it by --config, with [status] enabled, "
            "so that it can be asked, or stop the gateway first"
        ) from fault
    url = own_url(which.settings.status) + path
    try:
        with own_client(_WITHIN_S) as client:
            reply = client.post(url, json=body).raise_for_status()
        return msgspec.json.decode(reply.content, type=answer)
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError) as unanswered:
        raise SpoolInUse(f"{fault}, and does not answer at {url}: {unanswered}") from unanswered

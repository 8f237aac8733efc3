"""A webhook as a channel: POST of a JSON document. Redirects are not followed.

"slack": `{"text": ...}`, which Slack, Mattermost, Rocket.Chat and others take. "json": the whole message
(docs/alerts.md).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import httpx
import msgspec

from cloud_sync.destinations.http_client import HttpOptions, http_client
from gateway.processing.notify import ChannelFault

if TYPE_CHECKING:
    from gateway.processing.messages import Message


class WebhookChannel:
    """Implements `Channel`. The address may be a secret: it is in no message."""

    def __init__(
        self,
        name: str,
        url: str,
        *,
        form: Literal["slack", "json"] = "slack",
        token: str = "",
        options: HttpOptions = HttpOptions(connections=1),  # noqa: B008 - an immutable value
        timeout_s: float = 10.0,
    ) -> None:
        self.name = name
        self._url = url
        self._form = form
        self._timeout_s = timeout_s
        headers = {"content-type": "application/json"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        self._client = http_client(
            options, secure=url.startswith("https:"), timeout=timeout_s, headers=headers
        )

    async def send(self, message: Message) -> None:
        """POST it; any 2xx will do.

        Raises:
            ChannelFault: no answer, or another one.
        """
        document = {"text": message.text} if self._form == "slack" else message.document()
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                content = msgspec.json.encode(document)
                async with self._client.stream("POST", self._url, content=content) as answer:
                    taken, status = (
                        answer.is_success,
                        answer.status_code,
                    )  # its body is nobody's, however long
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as fault:
            raise ChannelFault(f"no answer ({type(fault).__name__})") from fault
        if not taken:
            raise ChannelFault(f"it answered {status}")

    async def aclose(self) -> None:
        """Close its connection."""
        await self._client.aclose()

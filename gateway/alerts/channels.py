"""Alert channels that need a client library: e-mail (aiosmtplib) and webhook (httpx).

Import only when one is configured.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import TYPE_CHECKING, Literal

import aiosmtplib
import httpx
import msgspec

from cloud_sync.destinations.http_client import HttpOptions, build_http_client
from gateway.alerts.notifier import ChannelError

if TYPE_CHECKING:
    import ssl

    from gateway.alerts.notifier import AlertMessage

_log = logging.getLogger(__name__)
_ONE_CONNECTION = HttpOptions(connections=1)


@dataclass(frozen=True, slots=True)
class MailServer:
    """How to reach the server; without `context` the system's certificates are trusted."""

    host: str
    port: int = 587
    tls: Literal["starttls", "tls", "none"] = "starttls"
    username: str = ""
    password: str = ""
    context: ssl.SSLContext | None = None
    timeout_s: float = 30.0


class MailChannel:
    """Implements `AlertChannel`."""

    def __init__(self, name: str, server: MailServer, sender: str, recipients: tuple[str, ...]) -> None:
        self.name = name
        self._server = server
        self._sender = sender
        self._recipients = recipients

    async def send(self, message: AlertMessage) -> None:
        """Send it; raises ChannelError when the server is unreachable or accepts no recipient."""
        server, mail = self._server, EmailMessage()
        mail["From"], mail["To"] = self._sender, ", ".join(self._recipients)
        mail["Subject"] = _one_line(message.subject)
        mail["Date"] = formatdate()
        mail["Message-ID"] = make_msgid(domain=self._sender.partition("@")[2] or None)
        mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office answers
        mail.set_content("\n".join(map(_one_line, message.text.split("\n"))) + "\n")
        try:
            async with asyncio.timeout(3 * server.timeout_s):
                refused, _ = await aiosmtplib.send(
                    mail,
                    hostname=server.host,
                    port=server.port,
                    use_tls=server.tls == "tls",
                    start_tls=server.tls == "starttls",
                    tls_context=server.context,
                    username=server.username or None,
                    password=server.password or None,
                    timeout=server.timeout_s,
                )
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as fault:
            what = f"{type(fault).__name__}: {str(fault)[:200]}"
            raise ChannelError(f"{server.host}:{server.port}: {what}") from fault
        if refused:  # sending again would reach the others twice
            _log.warning("channel %s: %s refused %s", self.name, server.host, ", ".join(sorted(refused)))

    async def aclose(self) -> None:
        """Nothing to close."""


def _one_line(text: str) -> str:
    """Replace line separators (such as U+2028 in a device's name), which no mail header may contain."""
    return " ".join(text.encode(errors="replace").decode().splitlines())


class WebhookChannel:
    """Implements `AlertChannel`. The URL may be a secret and is in no message."""

    def __init__(
        self,
        name: str,
        url: str,
        *,
        form: Literal["slack", "json"] = "slack",
        token: str = "",
        options: HttpOptions = _ONE_CONNECTION,
        timeout_s: float = 10.0,
    ) -> None:
        self.name = name
        self._url = url
        self._form = form
        self._timeout_s = timeout_s
        headers = {"content-type": "application/json"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        self._client = build_http_client(
            options, secure=url.startswith("https:"), timeout=timeout_s, headers=headers
        )

    async def send(self, message: AlertMessage) -> None:
        """POST it; raises ChannelError unless the answer is 2xx."""
        document = {"text": message.text} if self._form == "slack" else message.document()
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                content = msgspec.json.encode(document)
                async with self._client.stream("POST", self._url, content=content) as answer:
                    accepted, status = answer.is_success, answer.status_code  # the body is not read
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as fault:
            raise ChannelError(f"no answer ({type(fault).__name__})") from fault
        if not accepted:
            raise ChannelError(f"it answered {status}")

    async def aclose(self) -> None:
        """Close the connection."""
        await self._client.aclose()

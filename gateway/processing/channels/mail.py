"""E-mail as a channel: one message, one connection to the mail server."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import TYPE_CHECKING, Literal

import aiosmtplib

from gateway.processing.notify import ChannelFault

if TYPE_CHECKING:
    import ssl

    from gateway.processing.messages import Message


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MailServer:
    """How to reach the server.

    Attributes:
        tls: "starttls" before anything is said, "tls" from the start, or "none".
        context: what to trust; the system's trust when None.
    """

    host: str
    port: int = 587
    tls: Literal["starttls", "tls", "none"] = "starttls"
    username: str = ""
    password: str = ""
    context: ssl.SSLContext | None = None
    timeout_s: float = 30.0


class MailChannel:
    """Implements `Channel`."""

    def __init__(self, name: str, server: MailServer, sender: str, recipients: tuple[str, ...]) -> None:
        self.name = name
        self._server = server
        self._sender = sender
        self._recipients = recipients

    async def send(self, message: Message) -> None:
        """Hand it to the server.

        Raises:
            ChannelFault: the server cannot be reached, or takes it for nobody.
        """
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
            raise ChannelFault(f"{server.host}:{server.port}: {_words(fault)}") from fault
        if refused:  # the others have it; to send it again would tell them twice
            _log.warning("channel %s: %s refuses %s", self.name, server.host, ", ".join(sorted(refused)))

    async def aclose(self) -> None:
        """Nothing is held."""


def _one_line(text: str) -> str:
    """What a device is called may hold what ends a line elsewhere (U+2028), which no header may."""
    return " ".join(text.encode(errors="replace").decode().splitlines())


def _words(fault: Exception) -> str:
    return f"{type(fault).__name__}: {str(fault)[:200]}"

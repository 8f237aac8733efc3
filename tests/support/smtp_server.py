"""A mail server for tests: aiosmtpd on loopback, with STARTTLS and a password where asked for."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from typing import TYPE_CHECKING

from aiosmtpd.controller import UnthreadedController
from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator
    from email.message import EmailMessage


@dataclass
class Mailbox:
    """What the server took; `refuse` is its answer to every message, "" to take it."""

    port: int = 0
    refuse: str = ""
    mails: list[EmailMessage] = field(default_factory=list)
    recipients: list[list[str]] = field(default_factory=list)

    async def handle_DATA(self, _server: SMTP, _session: object, envelope) -> str:  # noqa: N802 - aiosmtpd's name
        if self.refuse:
            return self.refuse
        self.mails.append(message_from_bytes(envelope.content, policy=policy.default))
        self.recipients.append(envelope.rcpt_tos)
        return "250 taken"


@asynccontextmanager
async def mail_server(
    *, tls: ssl.SSLContext | None = None, password: tuple[str, str] | None = None
) -> AsyncIterator[Mailbox]:
    """A server on a free port of loopback."""
    mailbox = Mailbox()

    def authenticate(_server, _session, _envelope, _mechanism, data) -> AuthResult:
        known = isinstance(data, LoginPassword) and password == (data.login.decode(), data.password.decode())
        return AuthResult(success=known, handled=False)

    controller = UnthreadedController(
        mailbox,
        loop=asyncio.get_running_loop(),
        hostname="127.0.0.1",
        port=0,
        tls_context=tls,
        require_starttls=tls is not None,
        authenticator=authenticate if password else None,
        auth_required=password is not None,
    )
    server = await controller.loop.create_server(controller.factory, host="127.0.0.1", port=0)
    mailbox.port = server.sockets[0].getsockname()[1]
    try:
        yield mailbox
    finally:
        server.close()
        await server.wait_closed()

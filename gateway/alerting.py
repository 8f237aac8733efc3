"""Alerts as the settings want them: the stage that raises them, and the desks that tell people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud_sync.destinations.http_client import HttpOptions, tls_context
from gateway.processing.alerts import AlertStage
from gateway.processing.channels.log import LogChannel
from gateway.processing.messages import notices_of
from gateway.processing.notify import ChannelDesk
from gateway.settings import secret_of
from gateway.settings.alerts import AnyChannel, WebhookSettings
from gateway.spool import outbox

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from gateway.processing.alerts import Event
    from gateway.processing.notify import Channel
    from gateway.settings import GatewaySettings
    from gateway.spool.database import Database
    from gateway.spool.series import SeriesBook


def alert_stage_of(settings: GatewaySettings, book: SeriesBook) -> AlertStage | None:
    """The stage that raises alerts; None when there are to be none."""
    if not settings.alerts.enabled:
        return None

    def name_of(number: int) -> tuple[str, str]:
        return book[number][:2]

    def expected() -> NDArray[np.int32]:
        return book.all_identities()

    def tell(connection: sqlite3.Connection, events: Sequence[Event], now_us: int) -> None:
        for channels, notice in notices_of(events, name_of):
            outbox.put(connection, channels, notice, now_us)

    stale_us = min(round(settings.alerts.stale_s * 1e6), 1 << 60)
    return AlertStage(settings.alerts.rules, name_of, expected, tell, stale_us=stale_us)


def desks_of(settings: GatewaySettings, database: Database) -> tuple[ChannelDesk, ...]:
    """A desk for each channel.

    Raises:
        OSError: a file that a channel names cannot be used.
    """
    alerts = settings.alerts
    if not alerts.enabled:
        return ()
    channels: list[Channel] = [LogChannel(), *map(_channel_of, alerts.channel)]
    return tuple(ChannelDesk(channel, database, settings.gateway_id, alerts.terms) for channel in channels)


async def forget_channels_but(settings: GatewaySettings, database: Database) -> None:
    """Forget what is still queued for channels that are gone."""
    alerts = settings.alerts
    await database.write(lambda c: outbox.keep_only(c, alerts.channel_names if alerts.enabled else ()))


def _channel_of(channel: AnyChannel) -> Channel:
    tls = None if channel.ca_file is None else tls_context(channel.ca_file)
    if isinstance(channel, WebhookSettings):
        from gateway.processing.channels.webhook import WebhookChannel  # noqa: PLC0415 - brings httpx

        url = secret_of(channel.url_file) if channel.url_file is not None else channel.url
        assert url is not None
        return WebhookChannel(
            channel.name,
            url,
            form=channel.form,
            token="" if channel.token_file is None else secret_of(channel.token_file),
            options=HttpOptions(tls, connections=1),
            timeout_s=channel.timeout_s,
        )
    from gateway.processing.channels.mail import MailChannel, MailServer  # noqa: PLC0415 - brings aiosmtplib

    server = MailServer(
        channel.host,
        channel.port,
        channel.tls,
        channel.username or "",
        "" if channel.password_file is None else secret_of(channel.password_file),
        tls,
        channel.timeout_s,
    )
    return MailChannel(channel.name, server, channel.sender, tuple(channel.to))

"""From a `[[ingress.subscribe]]` table to the subscriber that it describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.ingress.subscriber import Subscriber
from gateway.ingress.subscription import SubscribeSettings, address_of

if TYPE_CHECKING:
    from gateway.ingress.intake import Intake
    from gateway.settings import Subscribe


def subscriber_of(table: Subscribe, gateway_id: str, intake: Intake) -> Subscriber:
    """The subscriber of one broker; its session there is called after the gateway."""
    return Subscriber(
        SubscribeSettings(
            name=table.name or address_of(table.url).host,
            url=table.url,
            client_id=table.client_id or f"tidegate-{gateway_id}",
            filters=tuple(table.filters),
            unsubscribe=tuple(table.unsubscribe),
            qos=table.qos,
            retained=table.retained,
            username=table.username,
            password_file=table.password_file,
            ca_file=table.ca_file,
            cert_file=table.cert_file,
            key_file=table.key_file,
            server_name=table.server_name,
            receive_maximum=table.receive_maximum,
            session_expiry_s=table.session_expiry_s,
            keep_alive_s=table.keep_alive_s,
            max_packet_bytes=table.max_packet_bytes,
            broker_reviewed=table.broker_reviewed,
        ),
        intake,
    )

"""`[ingress.listen]`: the gateway's own MQTT server, and who may connect to it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from gateway.ingress.topics import TopicTemplate
from gateway.settings.door import Door
from gateway.settings.tables import Count, Port  # noqa: TC001 - pydantic reads the annotations


class Listen(Door):
    """The gateway's own MQTT server."""

    port: Port = 1883
    """The TCP port: 1883 by convention, 8883 with TLS."""
    topic: str = "sensors/{sensor_id}/{sensor_type}"
    """Which series a topic names. One level of the topic for each member in braces."""
    max_connections: Count = 10_500
    """Connections beyond it are closed at once, or take the place of one that has said nothing yet."""
    max_packet_bytes: Annotated[int, Field(ge=128, le=268_435_455)] = 1 << 20
    """The largest packet taken."""

    @field_validator("topic")
    @classmethod
    def _is_template(cls, topic: str) -> str:
        TopicTemplate(topic)
        return topic

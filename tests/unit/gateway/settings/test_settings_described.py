"""Every key of the gateway's configuration says what it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud_sync.runtime.settings_file import find_models
from gateway.settings.gateway_settings import GatewaySettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel


def undescribed(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if not field.description:
            yield f"{model.__name__}.{name}"
        for inner in find_models(field.annotation):
            yield from undescribed(inner)


def test_every_key_has_a_description_under_it_in_the_source() -> None:
    assert list(undescribed(GatewaySettings)) == []

"""The description of the service says what the service does."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.routing import Route

from cloud_sync.codec import plain_readings, wire
from cloud_sync.http import tokens
from cloud_sync.http.requests import RequestAdmission, RequestLimits
from cloud_sync.ingest.app import IngestApp
from cloud_sync.ingest.apply_queue import ApplyQueue
from cloud_sync.model.reading_builder import UNIT_SCALES
from cloud_sync.timescale.sink import TimescaleSink
from tests.support.ingest_service import running
from tests.support.wire_examples import batch


@pytest.fixture
async def service(postgres_dsn, tmp_path):
    async with running(postgres_dsn, tmp_path) as service:
        yield service


def resolved(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        found: Any = document
        for step in node["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        node = found
    return node


KINDS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def check(document: dict[str, Any], schema: dict[str, Any], value: Any, place: str = "") -> None:
    """The part of JSON Schema that the description uses."""
    schema = resolved(document, schema)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds == ["object"]:
        assert isinstance(value, dict), place
        assert set(schema.get("required", [])) <= set(value), place
        assert set(value) <= set(schema.get("properties", value)), place
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                check(document, inner, value[name], f"{place}.{name}")
    elif kinds == ["array"]:
        assert isinstance(value, list), place
        for index, one in enumerate(value):
            check(document, schema["items"], one, f"{place}[{index}]")
    elif kinds:
        assert any(isinstance(value, KINDS[kind]) for kind in kinds), f"{place}: {value!r}"
    if "enum" in schema:
        assert value in schema["enum"], place


async def described(service: Any, response: Any, path: str) -> None:
    document = (await service.http.get("/openapi.json")).json()
    operation = document["paths"][path][response.request.method.lower()]
    assert str(response.status_code) in operation["responses"], f"{path} {response.status_code}"
    answer = resolved(document, operation["responses"][str(response.status_code)])
    check(document, answer["content"]["application/json"]["schema"], response.json())


async def test_the_description_names_exactly_the_routes_there_are(service):
    document = (await service.http.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    paths = {(path, method) for path, item in document["paths"].items() for method in item}
    assert {path for path, method in paths if method == "post"} == {"/v1/batches", "/v1/readings"}
    for path, method in paths:
        status = (await service.http.request(method, path.replace("{gateway_id}", "gw-1"))).status_code
        assert status not in (404, 405, 500), path
    for path in ("/docs", "/v1", "/v1/batches/1", "/"):
        assert (await service.http.get(path)).status_code == 404


async def test_requests_are_described_with_what_the_service_accepts(service):
    document = (await service.http.get("/openapi.json")).json()
    readings = document["paths"]["/v1/readings"]["post"]
    batches = document["paths"]["/v1/batches"]["post"]
    choices = {each["name"]: each["schema"].get("enum") for each in readings["parameters"]}
    assert list(readings["requestBody"]["content"]) == list(plain_readings.MEDIA_TYPES)
    assert list(batches["requestBody"]["content"]) == [wire.MEDIA_TYPE]
    assert choices["precision"] == list(UNIT_SCALES)
    assert choices["Content-Encoding"] == list(plain_readings.CONTENT_ENCODINGS)
    authenticator: Any = None
    app = IngestApp(
        TimescaleSink(""), authenticator, RequestAdmission(RequestLimits()), ApplyQueue(1), wire.WireLimits()
    ).build()
    routes = {
        (route.path, method)
        for route in app.routes
        if isinstance(route, Route) and route.methods
        for method in route.methods - {"HEAD"}
    }
    described = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    assert described == routes


async def test_answers_are_as_described(service):
    media = {"Content-Type": wire.MEDIA_TYPE}
    view = tokens.add_token(service.tokens_file, "eye", "view")
    readings = tokens.add_token(service.tokens_file, "app", "readings")
    one = await service.http.post("/v1/batches", content=wire.encode(batch(2)), headers=media)
    part = batch(5)
    part = type(part)(part.range._replace(part=1, parts=2), part.series, part.readings)
    two = await service.http.post("/v1/batches", content=wire.encode(part), headers=media)
    assert (one.status_code, two.status_code, two.json()["parts"]) == (200, 200, 2)
    for response in (one, two, await service.http.post("/v1/batches", content=b"x", headers=media)):
        await described(service, response, "/v1/batches")
    await described(service, await service.http.get("/v1/gateways/gw-1"), "/v1/gateways/{gateway_id}")
    await described(service, await service.http.get("/v1/gateways/gw-2"), "/v1/gateways/{gateway_id}")
    await described(service, await service.http.get("/v1/gateways"), "/v1/gateways")
    seen = await service.http.get("/v1/gateways", headers={"Authorization": f"Bearer {view}"})
    assert [each["gateway_id"] for each in seen.json()["gateways"]] == ["gw-1"]
    await described(service, seen, "/v1/gateways")
    stored = await service.http.post(
        "/v1/readings",
        json=[{"sensor_id": "s", "sensor_type": "t", "value": 1, "ts": 1_750_000_000}, 7],
        headers={"Authorization": f"Bearer {readings}"},
    )
    assert (stored.status_code, stored.json()["stored"]) == (200, 1)
    await described(service, stored, "/v1/readings")
    await described(service, await service.http.get("/healthz"), "/healthz")
    await described(service, await service.http.get("/readyz"), "/readyz")

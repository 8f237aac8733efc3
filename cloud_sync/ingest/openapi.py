"""The OpenAPI description of the service. Pure. `docs/wire-format.md` says the same in words."""

from __future__ import annotations

from typing import Any

from cloud_sync.codec import plain_readings, wire
from cloud_sync.codec.line_protocol import PRECISION_SCALES
from cloud_sync.codec.plain_readings import CONTENT_ENCODINGS

_INTEGER = {"type": "integer"}
_TEXT = {"type": "string"}
_MOMENT = {"type": "string", "format": "date-time"}
_SPANS = {"type": "array", "items": {"type": "array", "items": _INTEGER, "minItems": 2, "maxItems": 2}}
_CLASS = {"type": "string", "enum": ["alert", "declaration", "rollup", "reading"]}
_NAMES = {"gateway_id": _TEXT, "epoch": {"type": "string", "format": "uuid"}, "class": _CLASS}
_COMMITS = {"first_commit": _INTEGER, "last_commit": _INTEGER}
_COUNTS = dict.fromkeys(("rows", "stored", "duplicates", "conflicts"), _INTEGER)

_FAULTS = {
    400: "The body, or a part of the request, cannot be understood. Do not repeat it.",
    401: "The token is missing or unknown.",
    403: "The token is for another gateway, or for something else.",
    408: "The body came too slowly. Repeat.",
    409: "Part of the range was applied before, or all of it with other rows. Do not repeat.",
    413: "Too large: send less at a time.",
    415: "The Content-Type or Content-Encoding is not taken.",
    422: "The database cannot hold what the body says, or the Idempotency-Key came with another body.",
    429: "Too many requests of this caller are in progress. Repeat, not before Retry-After.",
    503: "No room now, or the database is away. Repeat, not before Retry-After.",
}


def build_openapi() -> dict[str, Any]:
    """The document that /openapi.json answers with."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tidegate ingest",
            "version": "1",
            "description": "Takes batches from gateways and readings from clients; answers after the commit.",
        },
        "paths": {
            "/v1/batches": {"post": _batches()},
            "/v1/readings": {"post": _readings()},
            "/v1/gateways": {
                "get": _get(
                    "What has been applied of every gateway. Needs a token of scope view.",
                    _object({"gateways": {"type": "array", "items": _ref("Gateway")}}),
                    401,
                    403,
                    503,
                )
            },
            "/v1/gateways/{gateway_id}": {
                "get": {
                    "parameters": [
                        {"name": "gateway_id", "in": "path", "required": True, "schema": _TEXT},
                        {"name": "epoch", "in": "query", "schema": _NAMES["epoch"]},
                    ],
                    **_get("What has been applied of one gateway.", _ref("Gateway"), 400, 401, 403, 503),
                }
            },
            "/openapi.json": {"get": _open("This document.", {"type": "object"})},
            "/healthz": {
                "get": _open("Batches get their turn; 503 when they hang.", _object({"status": _TEXT}), 503)
            },
            "/readyz": {
                "get": _open("A batch could be applied now; 503 when not.", _object({"status": _TEXT}), 503)
            },
            "/metrics": {"get": _open("Metrics for Prometheus.", None)},
        },
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): _fault(status) for status in _FAULTS},
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "certificate": {"type": "mutualTLS", "description": "Names the gateway, instead of a token."},
            },
        },
        "security": [{"token": []}, {"certificate": []}],
    }


def _schemas() -> dict[str, Any]:
    epoch = {
        **_NAMES,
        "complete_through": _INTEGER,
        "ranges": _SPANS,
        "gaps": _SPANS,
        "partial": _SPANS,
        **_COUNTS,
        "refused": _INTEGER,
    }
    loss = {
        **_NAMES,
        **_COMMITS,
        "rows": _INTEGER,
        "reason": _TEXT,
        "survives": _TEXT,
        "declared_at": _MOMENT,
        "from_time": _MOMENT,
        "to_time": _MOMENT,
    }
    receipt = {
        "status": {"type": "string", "enum": ["applied", "duplicate"]},
        **_NAMES,
        **_COMMITS,
        **_COUNTS,
    }
    number = {"type": "number"}
    return {
        "Fault": _object({"error": _TEXT, "message": _TEXT}, rows={"type": "array", "items": _INTEGER}),
        "Receipt": _object(
            receipt, part=_INTEGER, parts=_INTEGER, credit=_object({"rows_per_s": number, "valid_s": number})
        ),
        "Stored": _object(
            {
                **dict.fromkeys(("stored", "duplicates", "conflicts"), _INTEGER),
                "rejected": {"type": "array", "items": _object({"index": _INTEGER, "reason": _TEXT})},
            },
            rejected_more=_INTEGER,
        ),
        "Reading": _object(
            {"sensor_id": _TEXT, "sensor_type": _TEXT, "value": {"type": ["number", "boolean"]}},
            ts={"type": ["number", "string"]},
            **dict.fromkeys(("quality", "battery_level", "signal_strength"), number),
            seq=_INTEGER,
            **dict.fromkeys(("location", "manufacturer", "firmware_version", "unit"), _TEXT),
        ),
        "Gateway": _object(
            {
                "gateway_id": _TEXT,
                "first_seen": {"type": ["string", "null"], "format": "date-time"},
                "last_seen": {"type": ["string", "null"], "format": "date-time"},
                "epochs": {"type": "array", "items": _object(epoch)},
                "declared": {"type": "array", "items": _object(loss)},
            }
        ),
    }


def _batches() -> dict[str, Any]:
    return {
        "summary": "Apply one wire batch (docs/wire-format.md), once however often it is sent.",
        "requestBody": {"required": True, "content": {wire.MEDIA_TYPE: {"schema": {"format": "binary"}}}},
        "responses": _responses(_ref("Receipt"), *(status for status in _FAULTS)),
    }


def _readings() -> dict[str, Any]:
    readings = {"oneOf": [_ref("Reading"), {"type": "array", "items": _ref("Reading")}]}
    content = {
        kind: {"schema": readings if kind == plain_readings.JSON else _TEXT}
        for kind in plain_readings.MEDIA_TYPES
    }
    return {
        "summary": "Store readings of a client that is no gateway, once by series and time.",
        "parameters": [
            {"name": "precision", "in": "query", "schema": {"enum": list(PRECISION_SCALES), "default": "ns"}},
            {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "maxLength": 255}},
            {"name": "Content-Encoding", "in": "header", "schema": {"enum": list(CONTENT_ENCODINGS)}},
        ],
        "requestBody": {"required": True, "content": content},
        "responses": _responses(_ref("Stored"), *(status for status in _FAULTS if status != 409)),  # noqa: PLR2004 - HTTP
        "security": [{"token": []}],
    }


def _get(summary: str, schema: dict[str, Any], *faults: int) -> dict[str, Any]:
    return {"summary": summary, "responses": _responses(schema, *faults)}


def _open(summary: str, schema: dict[str, Any] | None, *faults: int) -> dict[str, Any]:
    """A request that needs no token."""
    return {"summary": summary, "responses": _responses(schema, *faults), "security": []}


def _responses(schema: dict[str, Any] | None, *faults: int) -> dict[str, Any]:
    content = {"text/plain": {}} if schema is None else {"application/json": {"schema": schema}}
    good = {"200": {"description": "Done.", "content": content}}
    return good | {str(status): {"$ref": f"#/components/responses/{status}"} for status in faults}


def _fault(status: int) -> dict[str, Any]:
    headers = {"Retry-After": {"schema": _INTEGER, "description": "seconds"}} if status in (429, 503) else {}
    content = {"application/json": {"schema": _ref("Fault")}}
    return {"description": _FAULTS[status], "headers": headers, "content": content}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": required | optional, "required": list(required)}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}

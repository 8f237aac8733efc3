"""JSON answers of the service; an error is `{"error", "message"}` and perhaps `rows`.

400  a code of FormatError: the bytes are no batch      401  no_token, unknown_token
403  other_gateway, other_scope      408  body_too_slow      413  body_too_large      415  media_type
409  range_overlap, range_mismatch
422  every other code of Refused: the database cannot hold what the batch says
429  busy: too many requests of one caller      503  busy, database_away; both with Retry-After
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from cloud_sync.model.errors import FormatError, RefusedError, RetryLaterError
from cloud_sync.model.ledger_rules import Coverage, RangeConflictError, find_coverage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloud_sync.model.ledger_rules import DeclaredLoss, GatewayProgress
    from cloud_sync.model.records import BatchRange, Receipt

RequestHandler = Callable[[Request], Awaitable[Response]]

_log = logging.getLogger(__name__)
_CLIENT_CLOSED_STATUS = 499
MAX_ROWS_LISTED = 5000


class RequestRejectedError(Exception):
    """A request that is answered with a machine-readable `error` and a message for a person.

    `hang_up`: do not read the rest of the body. Otherwise it is read and discarded, so that a sender that
    reads only once it has written gets its answer. `rows`: the refused rows of a batch.
    """

    def __init__(
        self,
        status: int,
        error: str,
        message: str,
        *,
        retry_after_s: int | None = None,
        hang_up: bool = False,
        rows: Sequence[int] = (),
    ) -> None:
        super().__init__(message)
        self.rows = rows
        self.status = status
        self.error = error
        self.retry_after_s = retry_after_s
        self.hang_up = hang_up

    def response(self) -> JSONResponse:
        """The error as an HTTP answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.hang_up:
            headers["Connection"] = "close"
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        rows = {"rows": list(self.rows[:MAX_ROWS_LISTED])} if self.rows else {}
        return JSONResponse({"error": self.error, "message": str(self), **rows}, self.status, headers)


async def answer_not_found(_request: Request, fault: Exception) -> Response:
    """Starlette's handler of requests without a route."""
    assert isinstance(fault, HTTPException)
    return RequestRejectedError(fault.status_code, "no_such_request", str(fault.detail)).response()


async def answer_internal_error(_request: Request, fault: Exception) -> Response:
    """Starlette raises the error again, so that it is logged with its traceback."""
    message = f"a fault of this service: {type(fault).__name__}"
    return RequestRejectedError(500, "internal", message).response()


def answering(
    handler: RequestHandler,
    *,
    count_rejection: Callable[[str], None],
    reject_unavailable: Callable[[Exception], RequestRejectedError],
    unavailable: type[Exception],
) -> RequestHandler:
    """A handler whose every error becomes an answer, counted by its code.

    `reject_unavailable` answers `unavailable`, the errors of the store, and RetryLaterError.
    """

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            count_rejection("disconnected")
            return Response(status_code=_CLIENT_CLOSED_STATUS)
        except RequestRejectedError as fault:
            rejection = fault
        except FormatError as fault:
            rejection = RequestRejectedError(400, fault.reason, str(fault))
        except RangeConflictError as fault:
            rejection = RequestRejectedError(409, fault.reason, str(fault))
        except RefusedError as fault:
            rejection = RequestRejectedError(422, fault.reason, str(fault), rows=fault.rows)
        except (RetryLaterError, unavailable) as fault:
            if isinstance(fault, unavailable):
                _log.warning("%s %s: %s", request.method, request.url.path, fault)
            rejection = reject_unavailable(fault)
        count_rejection(rejection.error)
        return rejection.response()

    return answer


def require_media_type(request: Request, allowed: Sequence[str]) -> str:
    """The media type of a body; rejects one that is not allowed here."""
    media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type not in allowed:
        message = f"expected {', '.join(allowed)}, not {media_type or 'nothing'}"
        raise RequestRejectedError(415, "media_type", message)
    return media_type


def read_epoch(request: Request) -> UUID | None:
    """The epoch that a request for progress names."""
    try:
        return UUID(request.query_params["epoch"]) if "epoch" in request.query_params else None
    except ValueError as fault:
        raise RequestRejectedError(400, "bad_epoch", "epoch is no UUID") from fault


def receipt_to_json(applied: BatchRange, receipt: Receipt) -> dict[str, Any]:
    """A receipt as JSON; one applied before differs in its status and credit only."""
    parts = {} if applied.parts == 1 else {"part": applied.part, "parts": applied.parts}
    credit = {} if receipt.credit is None else {"credit": receipt.credit._asdict()}
    return {
        "status": "duplicate" if receipt.applied_before else "applied",
        **_range_to_json(applied),
        **parts,
        "rows": receipt.rows,
        "stored": receipt.stored,
        "duplicates": receipt.duplicates,
        "conflicts": receipt.conflicts,
        **credit,
    }


def progress_to_json(gateway_id: str, known: GatewayProgress | None) -> dict[str, Any]:
    """What has been applied of a gateway: per epoch and class, ranges, gaps from commit 1 on, and sums."""
    return {
        "gateway_id": gateway_id,
        "first_seen": known.first_seen.isoformat() if known else None,
        "last_seen": known.last_seen.isoformat() if known else None,
        "epochs": [_coverage_to_json(coverage) for coverage in find_coverage(known.ranges)] if known else [],
        "declared": [_loss_to_json(loss) for loss in known.declared] if known else [],
    }


def _coverage_to_json(coverage: Coverage) -> dict[str, Any]:
    return {
        **_range_to_json(coverage),
        "complete_through": coverage.complete_through,
        "ranges": coverage.spans,
        "gaps": coverage.gaps,
        "partial": coverage.partial,
        **{name: coverage.sum(name) for name in ("rows", "stored", "duplicates", "conflicts", "refused")},
    }


def _loss_to_json(loss: DeclaredLoss) -> dict[str, Any]:
    return {
        **_range_to_json(loss.range),
        "rows": loss.rows,
        "reason": loss.reason,
        "survives": loss.survives,
        "declared_at": loss.declared_at.isoformat(),
        "from_time": loss.from_time.isoformat() if loss.from_time else None,
        "to_time": loss.to_time.isoformat() if loss.to_time else None,
    }


def _range_to_json(applied: BatchRange | Coverage) -> dict[str, Any]:
    key = {
        "gateway_id": applied.gateway_id,
        "epoch": str(applied.epoch),
        "class": applied.record_class.name.lower(),
    }
    if isinstance(applied, Coverage):
        return key
    return {**key, "first_commit": applied.first_commit, "last_commit": applied.last_commit}

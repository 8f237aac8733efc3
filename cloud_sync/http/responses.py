"""What the service answers: JSON in every case, `{"error", "message"}` when it is no, perhaps `rows`. Pure.

400  a code of FormatError: the bytes are no batch      401  no_token, unknown_token
403  other_gateway, other_scope      408  body_too_slow      413  body_too_large      415  media_type
409  range_overlap, range_mismatch
422  every other code of Refused: the database cannot hold what the batch says
429  busy: too many requests of one caller      503  busy, database_away; both with Retry-After
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from cloud_sync.model.errors import RefusedError
from cloud_sync.model.ledger_rules import RangeConflictError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request

    from cloud_sync.model.errors import DeliveryError
    from cloud_sync.model.ledger_rules import DeclaredLoss, GatewayProgress
    from cloud_sync.model.records import BatchRange, Receipt

MAX_ROWS_LISTED = 5000
"""Bad rows that an answer names; a sender finds more in the answer to the rest."""

_SUMS = ("rows", "stored", "duplicates", "conflicts", "refused")


class RequestRejectedError(Exception):
    """A request that ends here.

    Args:
        status: of HTTP.
        error: the machine-readable code.
        message: for a person.
        retry_after_s: what the sender is asked to wait.
        hang_up: do not wait for the rest of the body. Otherwise it is read and thrown away, so that a sender
            that reads only when it has written gets its answer instead of a reset connection.
        rows: of a batch, the positions of those to blame; the first ones where there are very many.
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
        """The answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.hang_up:
            headers["Connection"] = "close"
        if self.status == 401:  # noqa: PLR2004 - RFC 9110 section 15.5.2
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


def rejection_from_error(fault: DeliveryError, retry_after_s: int) -> RequestRejectedError:
    """How a fault of the sink is told to a gateway. The database's refusal of *our* credentials is ours."""
    if isinstance(fault, RangeConflictError):
        return RequestRejectedError(409, fault.reason, str(fault))
    if isinstance(fault, RefusedError):
        return RequestRejectedError(422, fault.reason, str(fault), rows=fault.rows)
    return RequestRejectedError(503, "database_away", str(fault), retry_after_s=retry_after_s)


def receipt_to_json(applied: BatchRange, receipt: Receipt) -> dict[str, Any]:
    """A receipt as JSON, the same for one applied now and one applied before but for status and credit."""
    parts = {} if applied.parts == 1 else {"part": applied.part, "parts": applied.parts}
    credit = {} if receipt.credit is None else {"credit": receipt.credit._asdict()}
    return {
        "status": "duplicate" if receipt.applied_before else "applied",
        **_range_to_json(applied),
        "first_commit": applied.first_commit,
        "last_commit": applied.last_commit,
        **parts,
        "rows": receipt.rows,
        "stored": receipt.stored,
        "duplicates": receipt.duplicates,
        "conflicts": receipt.conflicts,
        **credit,
    }


def progress_to_json(gateway_id: str, known: GatewayProgress | None) -> dict[str, Any]:
    """What has been applied of a gateway: per epoch and class, ranges, gaps from commit 1 on, and sums."""
    epochs = []
    for _, group in groupby(known.ranges if known else (), key=lambda applied: applied.range[:3]):
        islands = list(group)
        spans = [(i.range.first_commit, i.range.last_commit) for i in islands if i.complete]
        gaps = [(a + 1, b - 1) for (_, a), (b, _) in pairwise([(0, 0), *spans]) if a + 1 < b]
        partial = [(i.range.first_commit, i.range.last_commit) for i in islands if not i.complete]
        end = spans[-1][1] if spans else 0
        gaps += [(end + 1, max(last for _, last in partial))] if partial and partial[-1][1] > end else []
        epochs.append(
            {
                **_range_to_json(islands[0].range),
                "complete_through": spans[0][1] if spans and spans[0][0] == 1 else 0,
                "ranges": spans,
                "gaps": gaps,
                "partial": partial,
                **{name: sum(getattr(i, name) for i in islands) for name in _SUMS},
            }
        )
    return {
        "gateway_id": gateway_id,
        "first_seen": known.first_seen.isoformat() if known else None,
        "last_seen": known.last_seen.isoformat() if known else None,
        "epochs": epochs,
        "declared": [_loss_to_json(loss) for loss in known.declared] if known else [],
    }


def _loss_to_json(loss: DeclaredLoss) -> dict[str, Any]:
    return {
        **_range_to_json(loss.range),
        "first_commit": loss.range.first_commit,
        "last_commit": loss.range.last_commit,
        "rows": loss.rows,
        "reason": loss.reason,
        "survives": loss.survives,
        "declared_at": loss.declared_at.isoformat(),
        "from_time": loss.from_time.isoformat() if loss.from_time else None,
        "to_time": loss.to_time.isoformat() if loss.to_time else None,
    }


def _range_to_json(applied: BatchRange) -> dict[str, Any]:
    return {
        "gateway_id": applied.gateway_id,
        "epoch": str(applied.epoch),
        "class": applied.record_class.name.lower(),
    }

"""The interface between the commit consumer and a processing stage. Pure.

A stage keeps its state in memory. `step` only computes; `accept` takes the new state over once the output is
durable. A failed transaction therefore changes nothing, and the same step can be repeated (promise 9).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from cloud_sync.model.records import Readings, Rollups

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping

    from cloud_sync.model.records import Records


class StageInput(NamedTuple):
    """One chunk of the commit log, or the passing of time alone.

    `series` are identities: the number of a series' first attribute state. `rollups` are those closed in this
    step by a stage before.
    """

    readings: Readings = Readings.empty()
    rollups: Rollups = Rollups.empty()
    now_us: int = 0
    clock_trusted: bool = True


class StageOutput(NamedTuple):
    """The result of a step: `records` to append durably, none of them empty, and changes of state.

    `state` holds changed keys of the table `processing_state`, None to delete, to be written with the next
    transaction. `snapshot` returns more of them, for large state; called in an executor thread before a
    transaction. `also` writes more in that transaction. `after` is private to the stage.
    """

    records: tuple[Records, ...] = ()
    state: Mapping[str, bytes | None] = {}
    snapshot: Callable[[], Mapping[str, bytes | None]] | None = None
    also: Callable[[sqlite3.Connection], None] | None = None
    after: object = None


class ProcessingStage(Protocol):
    """One stage of processing; `name` begins its keys in `processing_state`: "name/..."."""

    name: str

    def restore(self, state: Mapping[str, bytes]) -> None:
        """Restore the durable state: every key that begins with "name/"."""
        ...

    def step(self, step: StageInput) -> StageOutput:
        """Compute the result of a step without changing the stage; runs in an executor thread."""
        ...

    def accept(self, outcome: StageOutput, *, durable: bool) -> None:
        """Adopt `outcome.after`; `durable` when it was written, with its snapshot."""
        ...

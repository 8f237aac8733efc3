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

    `series` are identities: the number of a series' first attribute state. `readings` are in commit order;
    `rollups` are those closed in this step by a stage before.
    """

    readings: Readings = Readings.empty()
    rollups: Rollups = Rollups.empty()
    now_us: int = 0
    clock_trusted: bool = True


class StageOutput(NamedTuple):
    """The result of a step.

    Attributes:
        records: to append durably, none of them empty; `series` are identities.
        state: changed keys of the table `processing_state`, None to delete; written with the next durable
            transaction, the newest value of each key.
        snapshot: more such keys, for large state: called in an executor thread, only before a transaction. If
            the output is accepted afterwards, they are durable.
        also: more to write in that transaction.
        after: the state of the stage once this is accepted; private to the stage.
    """

    records: tuple[Records, ...] = ()
    state: Mapping[str, bytes | None] = {}
    snapshot: Callable[[], Mapping[str, bytes | None]] | None = None
    also: Callable[[sqlite3.Connection], None] | None = None
    after: object = None


class ProcessingStage(Protocol):
    """One stage of processing; `name` begins its keys in `processing_state`: "name/..."."""

    name: str

    def load(self, state: Mapping[str, bytes]) -> None:
        """Restore the durable state: every key that begins with "name/"."""
        ...

    def step(self, step: StageInput) -> StageOutput:
        """Compute the result of a step without changing the stage; runs in an executor thread."""
        ...

    def accept(self, outcome: StageOutput) -> None:
        """Adopt `outcome.after`: its transaction is durable, or none was needed."""
        ...

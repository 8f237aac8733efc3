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

    Attributes:
        readings: in commit order of their segments, `series` being identities (the number of a series' first
            attribute state); may be none.
        rollups: what the roller closed in this very step, `series` being identities; none before the roller.
        now_us: the time, microseconds since 1970 UTC.
        clock_trusted: whether `now_us` may be relied on.
    """

    readings: Readings = Readings.empty()
    rollups: Rollups = Rollups.empty()
    now_us: int = 0
    clock_trusted: bool = True


class StageOutput(NamedTuple):
    """What a stage makes of a step.

    Attributes:
        records: to be appended durably, `series` being identities, none of them empty.
        state: keys of the table `processing_state` to write, or to delete where None; only what changed. They
            are written with the next durable transaction, the newest value of each key.
        snapshot: more such keys, for state that is large: called only when a transaction is about to be
            written, in an executor thread. If its outcome is accepted afterwards, what it gave is durable.
        also: more to be done inside that transaction.
        after: the state of the stage once this is accepted; its own business.
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
        """Take up the durable state: every key that begins with "name/". Unknown versions are left out."""
        ...

    def step(self, step: StageInput) -> StageOutput:
        """What a step comes to. Changes nothing in the stage; runs in an executor thread."""
        ...

    def accept(self, outcome: StageOutput) -> None:
        """Take over `outcome.after`: its transaction is durable, or none was needed."""
        ...

"""`[processing]` and `[rollups]`: what is made of readings once they are committed."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from gateway.processing.closing import RollTerms
from gateway.processing.follower import FollowTerms
from gateway.processing.windows import DEFAULT_WINDOWS_S, nesting_fault
from gateway.settings.tables import Count, Table

_FOLLOW = FollowTerms()
_ROLL = RollTerms()


def _nested(lengths: list[int]) -> list[int]:
    fault = nesting_fault(lengths)
    if fault is not None:
        raise ValueError(f"{fault}; for example {list(DEFAULT_WINDOWS_S)}")
    return lengths


NoLess = Annotated[float, Field(ge=0, allow_inf_nan=False)]
WindowLength = Annotated[int, Field(ge=1, le=366 * 86400)]


class Processing(Table):
    """How processing follows the commits."""

    interval_s: Annotated[float, Field(ge=0, le=60)] = _FOLLOW.interval_s
    """New commits are looked at at most so often: rollups and alerts come as much later, and cost less."""
    checkpoint_s: Annotated[float, Field(ge=0, le=3600)] = _FOLLOW.checkpoint_s
    """What processing has to remember is written at least so often. What is newer is read again after a
    crash; less costs more writing.
    """

    @property
    def terms(self) -> FollowTerms:
        """The same for the follower."""
        return FollowTerms(interval_s=self.interval_s, checkpoint_s=self.checkpoint_s)


class RollupSettings(Table):
    """How readings are summarised."""

    enabled: bool = True
    """Whether there are rollups."""
    windows_s: Annotated[list[WindowLength], AfterValidator(_nested)] = list(DEFAULT_WINDOWS_S)  # noqa: RUF012 - pydantic copies it
    """Lengths of the windows in seconds, rising; each must hold whole ones of the one before."""
    lateness_s: NoLess = _ROLL.lateness_s
    """How long after its end a window waits, by the times of its own series. What comes later makes a
    revision.
    """
    idle_s: NoLess = _ROLL.idle_s
    """A window whose series is silent is closed by the clock once nothing came for it for so long."""
    close_every_s: NoLess = _ROLL.close_every_s
    """Windows are closed at most so often; each time is a commit of its own."""
    keep_d: NoLess = 90
    """How many days rollups, alerts and declarations stay once every destination has given its receipt; while
    the spool is full one at most.
    """
    max_open_windows: Count = _ROLL.max_open
    """How many windows of one length may be open at once. Beyond it those that nothing came for longest are
    closed early, and may get a revision.
    """

    @property
    def terms(self) -> RollTerms:
        """The same for the roller."""
        return RollTerms(
            windows_s=tuple(self.windows_s),
            lateness_s=self.lateness_s,
            idle_s=self.idle_s,
            close_every_s=self.close_every_s,
            max_open=self.max_open_windows,
        )

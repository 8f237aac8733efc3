"""`[clock]`: when the gateway's own clock is relied on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gateway.settings.tables import Table


class ClockSettings(Table):
    """When the gateway's own clock is relied on."""

    trust: Literal["auto", "synchronised", "always"] = "auto"
    """"auto": once it is synchronised, or where nothing synchronises it as long as it is past every time that
    is known to have been. "synchronised": nothing less. "always": whatever it says.
    """
    wait_max_s: Annotated[float, Field(ge=0, le=1e9)] = 600
    """How long readings without a time of their own wait in the spool for a clock in doubt, to get their
    true times. What comes or waits longer is delivered as it was stamped, flagged clock_in_doubt.
    """

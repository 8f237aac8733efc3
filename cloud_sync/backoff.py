"""How long to wait before sending again. Pure.

Exponential with full jitter, bounded by a ceiling, for ever: nothing is dropped because of retries. A
destination's own Retry-After is a floor, up to an hour, so that a mistaken header cannot stop a gateway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenacity import RetryCallState, wait_random_exponential

if TYPE_CHECKING:
    from tenacity.wait import wait_base

RETRY_AFTER_MAX_S = 3600.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits of 0..first_s, 0..2 first_s, 0..4 first_s, ... up to 0..ceiling_s.

    `floor_s` keeps the jitter from asking again at once.
    """

    first_s: float = 0.5
    ceiling_s: float = 60.0
    floor_s: float = 0.1

    def wait_s(self, attempt: int, retry_after_s: float | None = None) -> float:
        """Seconds to wait after failed attempt number `attempt` (1, 2, ...)."""
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]  # only its number is read
        state.attempt_number = attempt
        jittered = self._strategy(state)
        asked = min(retry_after_s or 0.0, RETRY_AFTER_MAX_S)
        return max(self.floor_s, jittered) if asked == 0.0 else asked + jittered

    @property
    def _strategy(self) -> wait_base:
        return wait_random_exponential(multiplier=self.first_s, max=self.ceiling_s)

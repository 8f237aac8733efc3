"""`tidegate doctor`: what is wrong with this machine, its files and its upstreams, and what to do about it.

Each check is a function from what it looks at to findings; `examine` runs them all. A check never changes
anything, and a machine without what it looks at (no systemd, no eMMC) is no fault.
"""

from __future__ import annotations

from gateway.operate.doctor.finding import Finding, Level

__all__ = ["Finding", "Level"]

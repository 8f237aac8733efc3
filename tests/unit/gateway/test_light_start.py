"""What the agent holds in memory before it is told to do more than take readings."""

from __future__ import annotations

import json
import subprocess
import sys

ON_DEMAND = (
    "httpx",
    "rich",
    "pygments",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "aiosmtplib",
    "pyarrow",
    "asyncpg",
)


def loaded_after(statements: str) -> set[str]:
    """Top-level packages that are loaded once `statements` have run in a process of their own."""
    told = "import json, sys; print(json.dumps([name for name, module in sys.modules.items() if module]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{statements}; {told}"], check=True, capture_output=True, timeout=60
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_the_agent_loads_web_servers_and_clients_only_when_it_is_to_have_them() -> None:
    assert loaded_after("import gateway.commands.gateway").isdisjoint(ON_DEMAND)


def test_the_command_line_loads_no_event_loop_before_a_command_is_called() -> None:
    assert loaded_after("import gateway.cli").isdisjoint((*ON_DEMAND, "asyncio", "numpy", "pydantic"))

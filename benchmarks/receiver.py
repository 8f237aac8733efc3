"""For comparison: an aiomqtt client that only receives, as its own process.

    python -m benchmarks.receiver PORT COUNT

Subscribes at QoS 1, prints "ready", receives and drops COUNT messages, then prints one number:
messages per second in its fastest second, the one that other processes disturbed least.
"""

from __future__ import annotations

import asyncio
import sys
import time
from bisect import bisect_right

import aiomqtt

_EVERY = 500
_WITHIN_S = 120


async def receive(port: int, count: int) -> float:
    """Messages per second while receiving `count` messages, in the fastest second."""
    at: list[float] = []
    async with asyncio.timeout(_WITHIN_S), aiomqtt.Client("127.0.0.1", port) as client:
        await client.subscribe("sensors/#", qos=1)
        print("ready", flush=True)
        received = 0
        async for _ in client.messages:
            if received % _EVERY == 0:
                at.append(time.monotonic())
            received += 1
            if received == count:
                break
    return fastest(at, _EVERY)


def fastest(at: list[float], step: int) -> float:
    """Events per second in the fastest second; `at` holds the time of each `step`-th event."""
    if at[-1] - at[0] <= 1:
        return (len(at) - 1) * step / (at[-1] - at[0])
    best = 0
    for begin, since in enumerate(at):
        best = max(best, bisect_right(at, since + 1) - 1 - begin)
    return float(best * step)


if __name__ == "__main__":
    print(asyncio.run(receive(int(sys.argv[1]), int(sys.argv[2]))))

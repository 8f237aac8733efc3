"""Stored rows from InfluxDB through its v1 query API, in the mapping of `lines`.

Only integer and float fields are read, grouped by all tags, in microseconds. The server is only read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import numpy as np

from firmware_sim.errors import SimError
from firmware_sim.lines import Names
from firmware_sim.truth import SEQ_ABSENT
from firmware_sim.verify import NUMBERS, STORED, Stored

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from firmware_sim.truth import Truth

_CHUNK_ROWS = 10_000
_TIMEOUT_S = 60.0


class _Series(msgspec.Struct):
    name: str
    columns: list[str]
    values: list[list[float | int | str | bool | None]]
    tags: dict[str, str] = {}


class _Result(msgspec.Struct):
    series: list[_Series] = []
    error: str = ""


class _Answer(msgspec.Struct):
    results: list[_Result] = []
    error: str = ""


_decoder = msgspec.json.Decoder(_Answer)


def fetch(
    url: str, database: str, truth: Truth, *, on_rows: Callable[[int], None], token: str = ""
) -> Stored:
    """Read all points within the truth's time range. A token is for InfluxDB 2 and 3, which have this API
    too.

    Raises:
        SimError: the server cannot be reached, or refuses.
    """
    if not truth.rows:
        return Stored(np.empty(0, STORED), idempotent=True)
    names = Names(truth)
    times = truth.produced["time_us"]
    query = f"SELECT * FROM /.*/ WHERE time >= {times.min()}u AND time <= {times.max()}u GROUP BY *"  # noqa: S608 - integers of ours
    asked = {"db": database, "q": query, "epoch": "u", "chunked": "true", "chunk_size": str(_CHUNK_ROWS)}
    parts: list[NDArray[Any]] = []
    foreign = total = 0
    try:
        headers = {"Authorization": f"Token {token}"} if token else {}
        endpoint = f"{url.rstrip('/')}/query"
        with httpx.stream("GET", endpoint, params=asked, headers=headers, timeout=_TIMEOUT_S) as response:
            for line in response.iter_lines():
                if not line.strip():
                    continue
                for series in _series_of(_decoder.decode(line), url):
                    found = names.find(series.name, series.tags)
                    if found[0] < 0:
                        foreign += len(series.values)
                        continue
                    parts.append(_as_stored(series, *found))
                    total += len(series.values)
                    on_rows(total)
            if response.is_error:
                raise SimError(f"--influx {url}: HTTP {response.status_code}")
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError) as fault:
        raise SimError(f"--influx {url}: {str(fault) or type(fault).__name__}") from fault
    rows = np.concatenate(parts) if parts else np.empty(0, STORED)
    return Stored(rows, foreign=foreign, idempotent=True)


def _series_of(answer: _Answer, url: str) -> list[_Series]:
    for error in (answer.error, *(result.error for result in answer.results)):
        if error:
            raise SimError(f"--influx {url}: {error}")
    return [series for result in answer.results for series in result.series]


def _as_stored(series: _Series, number: int, state: int) -> NDArray[Any]:
    rows = np.zeros(len(series.values), STORED)
    rows["series"], rows["state"] = number, state
    columns = dict(zip(series.columns, zip(*series.values, strict=True), strict=True))
    rows["time_us"] = np.array(columns["time"], np.int64)
    for name in (*NUMBERS, "flags"):
        given = columns.get(name, (None,) * len(rows))
        absent: float = {"seq": SEQ_ABSENT, "flags": 0}.get(name, np.nan)
        rows[name] = [absent if cell is None else cell for cell in given]
    return rows

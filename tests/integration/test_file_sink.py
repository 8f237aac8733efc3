"""The file destination on a real file system: what is on disk after every kind of interruption."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cloud_sync.destinations.file import FileDestination, FileOptions
from cloud_sync.destinations.output_files import merge_span
from cloud_sync.model.errors import RetryLaterError
from tests.support.batches import batch_of
from tests.support.destination_kinds import file_lines, rows_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from cloud_sync.model.records import Batch

T0_US = 1_767_225_600_000_000
ROWS_PER_BATCH = 20
ROOT = Path(__file__).parents[2]


def batch(number: int, *, gateway_id: str = "gw-1") -> Batch:
    start = T0_US + number * 1_000_000
    content = [("t-1", "temperature", start + n, float(number)) for n in range(ROWS_PER_BATCH)]
    return batch_of(content, first=number, last=number, gateway_id=gateway_id)


def rows_in(directory: Path) -> list[tuple[int, float]]:
    return sorted(row[2:] for row in rows_of(file_lines(directory), unit_per_us=1000))


def rows_of_batches(numbers: Iterable[int]) -> list[tuple[int, float]]:
    return sorted((T0_US + i * 1_000_000 + n, float(i)) for i in numbers for n in range(ROWS_PER_BATCH))


def manifest(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "manifest.jsonl").read_text().splitlines()]


async def send_all(destination: FileDestination, numbers: Iterable[int], **of: str) -> None:
    for number in numbers:
        await destination.send(destination.encode(batch(number, **of)))


@contextlib.asynccontextmanager
async def opened(directory: Path, **options: Any) -> AsyncIterator[FileDestination]:
    clock = {name: options.pop(name) for name in ("wall_clock",) if name in options}
    destination = FileDestination("stick", directory, FileOptions(**options), **clock)
    try:
        yield destination
    finally:
        await destination.aclose()


async def test_files_are_final_when_large_enough_and_the_manifest_says_what_they_hold(tmp_path):
    async with opened(tmp_path, rotate_bytes=300) as destination:
        await send_all(destination, range(1, 11))
        await destination.rotate()
    listed = manifest(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.lp.gz"))
    assert sorted(line["file"] for line in listed) == files
    assert len(files) > 2
    assert files[0] == "gw-1-0000007d-reading-00000001-00000003.lp.gz"
    for line in listed:
        data = (tmp_path / line["file"]).read_bytes()
        lines = gzip.decompress(data).decode().splitlines()
        times = [row[2] for row in rows_of(lines, unit_per_us=1000)]
        assert line["bytes"] == len(data)
        assert line["sha256"] == hashlib.sha256(data).hexdigest()
        assert line["rows"] == len(lines)
        assert (line["min_time_us"], line["max_time_us"]) == (min(times), max(times))
    spans = [tuple(span) for line in listed for span in line["ranges"]]
    assert spans[0][0] == 1
    assert spans[-1][1] == 10
    assert rows_in(tmp_path) == rows_of_batches(range(1, 11))
    assert not list(tmp_path.glob("*.open*"))


async def test_a_file_is_final_when_old_enough_and_the_next_batch_comes(tmp_path):
    now_s = 1000.0
    async with opened(tmp_path, rotate_s=60, wall_clock=lambda: now_s) as destination:
        await send_all(destination, [1])
        now_s += 59
        await send_all(destination, [2])
        assert not list(tmp_path.glob("gw-1-*-00000002.lp.gz"))
        now_s += 1
        await send_all(destination, [3])
    assert [line["ranges"] for line in manifest(tmp_path)] == [[[1, 2]]]
    assert rows_in(tmp_path) == rows_of_batches([1, 2, 3])


async def test_batches_that_are_held_are_not_written_again_even_after_a_restart(tmp_path):
    for _ in range(3):
        async with opened(tmp_path, rotate_bytes=500) as destination:
            for number in (3, 1, 2, 4, 5, 6):
                receipt = await destination.send(destination.encode(batch(number)))
                assert receipt.stored == ROWS_PER_BATCH
    assert receipt.applied_before
    assert rows_in(tmp_path) == rows_of_batches(range(1, 7))


async def test_gateways_have_files_of_their_own_whatever_their_names(tmp_path):
    names = ["gw-1", "../../etc/passwd", "ö/ä", "x" * 900, "x" * 901, ".", "a b"]
    async with opened(tmp_path, compress=False) as destination:
        for name in names:
            await send_all(destination, [1], gateway_id=name)
        await destination.rotate()
    assert len(list(tmp_path.glob("*.lp"))) == len(names)
    assert {path.parent for path in tmp_path.rglob("*")} == {tmp_path}


async def test_a_change_of_compression_finishes_the_open_file(tmp_path):
    async with opened(tmp_path, compress=False) as destination:
        await send_all(destination, [1, 2])
    async with opened(tmp_path, compress=True) as destination:
        await send_all(destination, [2, 3])
        await destination.rotate()
    assert sorted(line["file"].partition(".")[2] for line in manifest(tmp_path)) == ["lp", "lp.gz"]
    assert rows_in(tmp_path) == rows_of_batches([1, 2, 3])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("tail", [b"torn", b"\n", b"\0" * 4096, b"\x1f\x8b\x08\0\0"])
async def test_a_tail_that_no_index_entry_covers_is_cut(tmp_path, tail, compress):
    async with opened(tmp_path, compress=compress) as destination:
        await send_all(destination, [1, 2])
    (data,) = tmp_path.glob("*.open.lp*")
    with data.open("ab") as target:
        target.write(tail)
    async with opened(tmp_path, compress=compress) as destination:
        await send_all(destination, [3, 2])
    assert rows_in(tmp_path) == rows_of_batches([1, 2, 3])


@pytest.mark.parametrize("keep", range(0, 120, 7))
async def test_a_torn_index_line_costs_only_its_batch_which_is_sent_again(tmp_path, keep):
    async with opened(tmp_path) as destination:
        await send_all(destination, [1])
        (index,) = tmp_path.glob("*.open.index")
        whole = index.stat().st_size
        await send_all(destination, [2])
    os.truncate(index, min(whole + keep, index.stat().st_size - 1))
    async with opened(tmp_path) as destination:
        receipt = await destination.send(destination.encode(batch(2)))
    assert not receipt.applied_before
    assert rows_in(tmp_path) == rows_of_batches([1, 2])


@pytest.mark.parametrize("left_bytes", [None, 0, 10])
async def test_an_open_file_that_was_taken_away_or_cut_is_declared_missing(tmp_path, left_bytes):
    async with opened(tmp_path) as destination:
        await send_all(destination, [1, 2])
    (data,) = tmp_path.glob("*.open.lp.gz")
    if left_bytes is None:
        data.unlink()
    else:
        os.truncate(data, left_bytes)
    async with opened(tmp_path) as destination:
        await send_all(destination, [3])
        await destination.rotate()
    missing, present = manifest(tmp_path)
    assert missing["missing"] == "gw-1-0000007d-reading.open"
    assert missing["ranges"] == [[1, 2]]
    assert present["ranges"] == [[3, 3]]
    assert rows_in(tmp_path) == rows_of_batches([3])


async def test_final_files_may_be_taken_away_at_any_time(tmp_path):
    async with opened(tmp_path, rotate_bytes=1) as destination:
        await send_all(destination, [1, 2])
        for path in tmp_path.glob("*.lp.gz"):
            path.unlink()
        await send_all(destination, [2, 3])
    assert rows_in(tmp_path) == rows_of_batches([3])
    assert [line["ranges"] for line in manifest(tmp_path)] == [[[1, 1]], [[2, 2]], [[3, 3]]]


async def test_a_directory_that_was_swapped_is_noticed(tmp_path):
    place = tmp_path / "stick"
    async with opened(place) as destination:
        await send_all(destination, [1])
        place.rename(tmp_path / "taken")
        await send_all(destination, [2])
    assert rows_in(place) == rows_of_batches([2])
    assert rows_in(tmp_path / "taken") == rows_of_batches([1])


async def test_no_directory_means_waiting_for_it_when_asked_to(tmp_path):
    place = tmp_path / "stick"
    async with opened(place, create=False) as destination:
        with pytest.raises(RetryLaterError, match="plug in the stick"):
            await send_all(destination, [1])
        place.mkdir()
        await send_all(destination, [1])
    assert rows_in(place) == rows_of_batches([1])


async def test_a_path_that_is_no_directory_is_said_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    async with opened(tmp_path / "file") as destination:
        with pytest.raises(RetryLaterError, match=str(tmp_path / "file")):
            await send_all(destination, [1])


async def test_too_little_room_holds_the_batch_and_says_so(tmp_path):
    async with opened(tmp_path, min_free_bytes=1 << 60) as destination:
        with pytest.raises(RetryLaterError, match=f"cannot write to {tmp_path}.*make room"):
            await send_all(destination, [1])
    assert rows_in(tmp_path) == []


async def test_a_second_writer_is_told_that_the_directory_is_taken(tmp_path):
    async with opened(tmp_path) as first, opened(tmp_path) as second:
        await send_all(first, [1])
        with pytest.raises(RetryLaterError, match="in use by another process"):
            await send_all(second, [2])
        await first.aclose()
        await send_all(second, [2])
    assert rows_in(tmp_path) == rows_of_batches([1, 2])


async def test_a_write_that_stops_halfway_leaves_nothing_behind(tmp_path):
    async with opened(tmp_path, compress=False) as destination:
        await send_all(destination, [1])
        (data,) = tmp_path.glob("*.open.lp")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (data.stat().st_size + 100, before[1]))
        try:
            with pytest.raises(RetryLaterError, match="cannot write"):
                await send_all(destination, [2])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        await send_all(destination, [2])
    assert rows_in(tmp_path) == rows_of_batches([1, 2])


class Interruptions:
    """Make one of the calls that change the disk fail, before or after it did its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.after = -1, False
        for owner, name in ((os, "fsync"), (os, "truncate"), (Path, "rename"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise OSError(errno.EIO, "interrupted")
            result = call(*args, **kwargs)
            if self.left == 0:
                raise OSError(errno.EIO, "interrupted")
            return result

        return wrapper


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("restart", [False, True])
async def test_an_interruption_at_any_step_leaves_every_batch_once(tmp_path, monkeypatch, after, restart):
    interruptions = Interruptions(monkeypatch)
    for step in itertools.count(1):
        place = tmp_path / str(step)
        interruptions.left, interruptions.after = step, after
        options: dict[str, Any] = {"rotate_bytes": 400, "compress": step % 2 == 0}
        destination, failed, todo = (
            FileDestination("stick", place, FileOptions(**options)),
            False,
            deque([*range(1, 8), None]),
        )
        while todo:
            try:
                if todo[0] is None:
                    await destination.rotate()
                else:
                    await send_all(destination, [todo[0]])
                todo.popleft()
            except RetryLaterError:
                failed = True
                if restart:
                    await destination.aclose()
                    destination = FileDestination("stick", place, FileOptions(**options))
        await destination.aclose()
        assert rows_in(place) == rows_of_batches(range(1, 8)), f"step {step}"
        files = sorted(line["file"] for line in manifest(place))
        assert files == sorted(path.name for path in place.glob("*.lp*")), f"step {step}"
        spans: list[tuple[int, int]] = []
        for line in manifest(place):
            for first, last in line["ranges"]:
                spans = merge_span(spans, first, last)
        assert spans == [(1, 7)], f"step {step}"
        if not failed:
            break
    assert step > 30


CHILD = f"""
import asyncio, itertools, sys
from tests.support.batches import batch_of
from cloud_sync.destinations.file import FileDestination, FileOptions

async def send_until_killed(directory, number):
    destination = FileDestination("stick", directory, FileOptions(rotate_bytes=2000))
    print("ready", flush=True)
    for current in itertools.count(number):
        start = {T0_US} + current * 1_000_000
        content = [("t-1", "temperature", start + n, float(current)) for n in range({ROWS_PER_BATCH})]
        await destination.send(destination.encode(batch_of(content, first=current, last=current)))
        print(current, flush=True)

asyncio.run(send_until_killed(sys.argv[1], int(sys.argv[2])))
"""


async def test_killed_at_any_moment_every_receipted_batch_is_there_once(tmp_path):
    source, receipted, number = random.Random(5), [], 1
    for _ in range(5):
        child = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs in this loop
            [sys.executable, "-c", CHILD, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        await asyncio.sleep(source.uniform(0.01, 0.15))
        child.send_signal(signal.SIGKILL)
        said = [int(line) for line in child.stdout.read().split("\n")[:-1]]
        child.stdout.close()
        child.wait()
        receipted += said
        number = max([number, *said])
    assert len(receipted) > 20
    async with opened(tmp_path) as destination:
        await send_all(destination, [*range(max(receipted) - 2, max(receipted) + 2)])
    assert rows_in(tmp_path) == rows_of_batches(range(1, max(receipted) + 2))


@pytest.mark.parametrize(
    ("spans", "new", "merged"),
    [
        ([], (3, 4), [(3, 4)]),
        ([(1, 2)], (3, 4), [(1, 4)]),
        ([(5, 6)], (3, 4), [(3, 6)]),
        ([(1, 2), (5, 6)], (3, 4), [(1, 6)]),
        ([(1, 1), (9, 9)], (4, 5), [(1, 1), (4, 5), (9, 9)]),
        ([(1, 9)], (4, 5), [(1, 9)]),
    ],
)
def test_spans_merge_when_they_touch(spans, new, merged):
    assert merge_span(spans, *new) == merged

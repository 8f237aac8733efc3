"""A disk in memory that can lose its power, and SQLite on it.

The disk writes down every write, truncation, sync, creation and deletion. `images` plays that record back
and stops it anywhere: what was synced is there; of every later write each 512-byte sector may be there or
not, whatever the order; files made or deleted since the last sync may or may not be. That is more than a
real file system loses, and it is what SQLite promises to survive.

SQLite reaches the disk through a VFS of apsw. Python's own sqlite3 has no VFS, so `connector` stands in
for `sqlite3.connect`: the spool's code runs unchanged on a connection that understands the same calls.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import apsw

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

SECTOR = 512
_POWERSAFE_OVERWRITE = 0x1000


class Op(NamedTuple):
    """One entry of the record: `what` is write, truncate, sync, create, delete or mark."""

    what: str
    inode: int = 0
    at: int = 0
    data: bytes = b""
    name: str = ""
    fact: object = None


class Disk:
    """Files by name, as a running program sees them, and the record of how they came to be."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self._inodes = itertools.count(1)
        self.names: dict[str, int] = {}
        self.contents: dict[int, bytearray] = {}
        self.record: list[Op] = []
        for name, content in (files or {}).items():
            self.contents[self.create(name)][:] = content
        self.record.clear()

    def create(self, name: str) -> int:
        inode = self.names[name] = next(self._inodes)
        self.contents[inode] = bytearray()
        self.record.append(Op("create", inode, name=name))
        return inode

    def delete(self, name: str, *, durable: bool) -> None:
        self.record.append(Op("delete", self.names.pop(name), name=name))
        if durable:
            self.record.append(Op("sync"))

    def mark(self, fact: object) -> None:
        """Note in the record that something has been promised."""
        self.record.append(Op("mark", fact=fact))


@dataclass
class _Platter:
    """What the record so far has made durable, and what it has not."""

    names: dict[str, int] = field(default_factory=dict)
    contents: dict[int, bytearray] = field(default_factory=dict)
    renamed: list[Op] = field(default_factory=list)
    pending: dict[int, list[Op]] = field(default_factory=dict)

    def apply(self, op: Op) -> None:
        if op.what in ("create", "delete"):
            self.renamed.append(op)
        elif op.what in ("write", "truncate"):
            self.pending.setdefault(op.inode, []).append(op)
        elif op.what == "sync":
            for change in self.renamed:
                _rename(self.names, change)
            self.renamed.clear()
            content = self.contents.setdefault(op.inode, bytearray())
            for change in self.pending.pop(op.inode, ()):
                _change(content, change)

    def image(self, chance: random.Random) -> dict[str, bytes]:
        """The files as a cut at this moment may leave them."""
        names = dict(self.names)
        for change in self.renamed[: chance.randint(0, len(self.renamed))]:
            _rename(names, change)
        kept = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        files = {}
        for name, inode in names.items():
            content = bytearray(self.contents.get(inode, b""))
            for op in self.pending.get(inode, ()):
                for part in _sectors(op):
                    if chance.random() < kept:
                        _change(content, part)
            files[name] = bytes(content)
        return files


def images(
    record: Sequence[Op], cuts: Sequence[int], chance: random.Random
) -> Iterator[tuple[dict[str, bytes], object]]:
    """For every cut (a sorted position in the record): the files left, and the newest fact promised."""
    platter, at, fact = _Platter(), 0, None
    for cut in cuts:
        for op in record[at:cut]:
            if op.what == "mark":
                fact = op.fact
            platter.apply(op)
        at = cut
        yield platter.image(chance), fact


def _rename(names: dict[str, int], op: Op) -> None:
    if op.what == "create":
        names[op.name] = op.inode
    else:
        names.pop(op.name, None)


def _change(content: bytearray, op: Op) -> None:
    if op.what == "truncate":
        del content[op.at :]
        return
    if len(content) < op.at:
        content.extend(bytes(op.at - len(content)))
    content[op.at : op.at + len(op.data)] = op.data


def _sectors(op: Op) -> Iterator[Op]:
    """A write as the pieces that are written whole or not at all."""
    start, end = op.at, op.at + len(op.data)
    while op.what == "write" and start < end:
        stop = min(end, (start // SECTOR + 1) * SECTOR)
        yield op._replace(at=start, data=op.data[start - op.at : stop - op.at])
        start = stop
    if op.what == "truncate":
        yield op


class _File:
    """An open file, as apsw calls it. One process, one connection: locks are granted."""

    def __init__(self, disk: Disk, inode: int) -> None:
        self._disk, self._inode = disk, inode
        self._content = disk.contents[inode]

    def xRead(self, amount, offset):  # noqa: N802 - SQLite's names, here and below
        return bytes(self._content[offset : offset + amount])

    def xWrite(self, data, offset):  # noqa: N802
        op = Op("write", self._inode, offset, bytes(data))
        self._disk.record.append(op)
        _change(self._content, op)

    def xTruncate(self, size):  # noqa: N802
        op = Op("truncate", self._inode, size)
        self._disk.record.append(op)
        _change(self._content, op)

    def xSync(self, _flags):  # noqa: N802
        self._disk.record.append(Op("sync", self._inode))

    def xFileSize(self):  # noqa: N802
        return len(self._content)

    def xClose(self):  # noqa: N802
        pass

    def xLock(self, level):  # noqa: N802
        pass

    def xUnlock(self, level):  # noqa: N802
        pass

    def xCheckReservedLock(self):  # noqa: N802
        return False

    def xFileControl(self, _op, _pointer):  # noqa: N802
        return False

    def xSectorSize(self):  # noqa: N802
        return 4096

    def xDeviceCharacteristics(self):  # noqa: N802
        return _POWERSAFE_OVERWRITE


class DiskVFS(apsw.VFS):
    """SQLite's way to the disk at hand: set `disk` before a connection is opened."""

    def __init__(self) -> None:
        self.disk = Disk()
        super().__init__("power", base="")

    def xOpen(self, name, _flags):  # noqa: N802
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        inode = self.disk.names.get(path)
        return _File(self.disk, self.disk.create(path) if inode is None else inode)

    def xAccess(self, path, _flags):  # noqa: N802
        return path in self.disk.names

    def xDelete(self, path, sync_directory):  # noqa: N802
        if path not in self.disk.names:
            raise apsw.IOError  # SQLite asks for journals that are not there
        self.disk.delete(path, durable=bool(sync_directory))

    def xFullPathname(self, name):  # noqa: N802
        return name


class Spoken:
    """An apsw connection that understands what the spool says to a `sqlite3.Connection`."""

    def __init__(self, connection: apsw.Connection, replaced: dict[str, str]) -> None:
        self._connection = connection
        self._replaced = replaced
        self.users = 1

    def execute(self, sql, parameters=()):
        return self._connection.execute(self._replaced.get(sql, sql), parameters)

    def executemany(self, sql, rows):
        return self._connection.executemany(sql, rows)

    def executescript(self, sql):
        return list(self._connection.execute(sql))

    @property
    def in_transaction(self):
        return self._connection.in_transaction

    def close(self):
        self.users -= 1
        if not self.users:
            self._connection.close()


def connector(vfs: DiskVFS, replaced: dict[str, str] | None = None):
    """What to put in the place of `sqlite3.connect`.

    A heap wal-index needs exclusive locking, so a reader shares the writer's connection. The log is
    checkpointed and cut back often, to have many moments of that kind among few operations.
    """
    shared: list[Spoken] = []
    without = {"PRAGMA query_only = 1": "SELECT 1", **(replaced or {})}

    def connect(address, **_):
        if shared and shared[0].users:
            shared[0].users += 1
            return shared[0]
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI
        connection = apsw.Connection(address, flags, vfs="power")
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA wal_autocheckpoint = 12")
        shared[:] = [Spoken(connection, without)]
        return shared[0]

    return connect

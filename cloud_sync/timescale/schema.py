"""Bringing a database to this release's schema: migrations, then what TimescaleDB adds.

Everything happens in one transaction under one advisory lock, so any number of services may start at once.
Migrations only go forward. A database that is ahead of this release is left alone and refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

import asyncpg

from cloud_sync.runtime.statements import load_statements

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloud_sync.timescale import Connection

_SQL = load_statements("cloud_sync", "sql", "schema.sql")
_MIGRATION_TIMEOUT_S = 3600.0


class SchemaTooNewError(Exception):
    """The database has migrations that this release does not know."""


class Migration(NamedTuple):
    """One step of the schema: a file `NNN_words.sql`; numbers start at 1 and leave no gap."""

    version: int
    name: str
    sql: str


def load_migrations() -> tuple[Migration, ...]:
    """Every migration of this release, oldest first."""
    folder = files("cloud_sync") / "sql"
    found = tuple(
        Migration(int(file.name[:3]), file.name.removesuffix(".sql"), file.read_text(encoding="utf-8"))
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name[:3].isdigit() and file.name.endswith(".sql")
    )
    assert [m.version for m in found] == list(range(1, len(found) + 1))
    return found


@dataclass(frozen=True, slots=True)
class TimescalePolicies:
    """What TimescaleDB does with old readings; None means nothing.

    No retention by default: it would drop what is delivered or replayed years late on its next run.
    """

    chunk: timedelta = timedelta(days=1)
    compress_after: timedelta | None = timedelta(days=7)
    drop_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class SchemaState:
    """The state a database was brought to, and the migrations applied just now.

    `timescale_version` is None on plain PostgreSQL; `notes` say what is not as it could be.
    """

    version: int
    applied: tuple[str, ...]
    timescale_version: str | None
    notes: tuple[str, ...]


async def prepare_schema(
    connection: Connection, policies: TimescalePolicies | None, migrations: Sequence[Migration] | None = None
) -> SchemaState:
    """Bring a database to this release's schema. Doing it again changes nothing.

    SchemaTooNewError when nothing was changed; errors of asyncpg as they come.
    """
    known = load_migrations() if migrations is None else migrations
    async with connection.transaction():
        await connection.execute(_SQL["no_timeout"])
        await connection.execute(_SQL["lock_schema"])
        if not await connection.fetchval(_SQL["has_migration_table"]):
            await connection.execute(_SQL["make_migration_table"])
        present = await connection.fetchval(_SQL["newest_migration"])
        if present > len(known):
            raise SchemaTooNewError(
                f"the database has schema version {present}, this release knows up to {len(known)}: "
                "use the release that made it, or a newer one"
            )
        for migration in known[present:]:
            await connection.execute(migration.sql, timeout=_MIGRATION_TIMEOUT_S)
            await connection.execute(_SQL["enter_migration"], migration.version, migration.name)
        notes: list[str] = []
        timescale = await _enable_timescale(connection, notes)
        if timescale is not None:
            await _create_hypertables(connection, policies or TimescalePolicies(), notes)
            if policies is not None:
                await _set_policies(connection, policies, notes)
        elif policies is not None and policies.drop_after is not None:
            notes.append("retention needs TimescaleDB: readings are kept without limit")
    return SchemaState(len(known), tuple(m.name for m in known[present:]), timescale, tuple(notes))


async def _enable_timescale(connection: Connection, notes: list[str]) -> str | None:
    """The version of TimescaleDB in this database, made here if the server has it; None when it cannot be."""
    installed = await connection.fetchval(_SQL["timescale_available"])
    if not installed:
        notes.append("plain PostgreSQL, without TimescaleDB: readings are neither chunked nor compressed")
    if installed is False:
        try:
            async with connection.transaction():
                await connection.execute(_SQL["create_timescale"])
        except asyncpg.PostgresError as fault:
            notes.append(f"the server has TimescaleDB, but CREATE EXTENSION failed: {fault}")
        else:
            notes.clear()
    version: str | None = await connection.fetchval(_SQL["timescale_version"])
    return version


async def _create_hypertables(connection: Connection, policies: TimescalePolicies, notes: list[str]) -> None:
    if not await connection.fetchval(_SQL["is_hypertable"]):
        await connection.execute(_SQL["make_hypertable"], policies.chunk)
        await _enable_compression(connection, "enable_compression", notes)
    if not await connection.fetchval(_SQL["is_rollup_hypertable"]):
        await connection.execute(_SQL["make_rollup_hypertable"])
        await _enable_compression(connection, "enable_rollup_compression", notes)


async def _enable_compression(connection: Connection, statement: str, notes: list[str]) -> None:
    try:
        async with connection.transaction():
            await connection.execute(_SQL[statement])
    except asyncpg.FeatureNotSupportedError as fault:
        notes.append(f"this TimescaleDB does not compress: {fault}")


async def _set_policies(connection: Connection, policies: TimescalePolicies, notes: list[str]) -> None:
    try:
        async with connection.transaction():
            await _set_policy(connection, "policy_compression", policies.compress_after)
            await _set_policy(connection, "policy_retention", policies.drop_after)
    except asyncpg.FeatureNotSupportedError as fault:
        notes.append(f"this TimescaleDB has no policies: {fault}")
    except asyncpg.InsufficientPrivilegeError as fault:
        notes.append(
            f"policies are left as they are, the owner's `tidegate ingest migrate` sets them: {fault}"
        )


async def _set_policy(connection: Connection, kind: str, after: timedelta | None) -> None:
    present = {row["proc_name"]: row["after"] for row in await connection.fetch(_SQL["policies"])}
    if present.get(kind) == after:
        return
    if kind in present:
        await connection.execute(_SQL[f"remove_{kind}"])
    if after is not None:
        await connection.execute(_SQL[f"add_{kind}"], after)

"""The regional database: its schema, its statements, the form in which rows enter it, and its series."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from cloud_sync.runtime.statements import load_statements

if TYPE_CHECKING:
    import asyncpg

    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

SQL = load_statements("cloud_sync", "sql", "regional.sql")

"""What salvage and the checker know of the spool's tables is what the file has."""

from __future__ import annotations

from gateway.spool.salvage import SPOOL_TABLES
from tests.support.open_spool import open_spool


async def test_the_list_of_tables_is_that_of_the_file_with_its_keys(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        tables = await spool.database.read(
            lambda c: {
                name: c.execute("SELECT max(pk) FROM pragma_table_info(?)", (name,)).fetchone()[0]
                for (name,) in c.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
                if not name.startswith("sqlite_")
            }
        )
    assert SPOOL_TABLES.keys() == tables.keys()
    for name, table in SPOOL_TABLES.items():
        assert table.key_columns in (0, tables[name]), name

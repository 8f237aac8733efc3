from __future__ import annotations

import json

from cloud_sync.delivery.lanes import ClaimRequest
from tests.support.open_spool import NOW_US, open_spool
from tests.support.programs import run


async def made(path):
    async with open_spool(path) as spool:
        await spool.append([("a", n, 0.0) for n in range(5)])
        await spool.deliveries.register("old", "influxdb", now_us=NOW_US)
        await spool.deliveries.register("new", "file", now_us=NOW_US)
        claimed = await spool.deliveries.claim("old", ClaimRequest(now_us=NOW_US))
        assert claimed is not None
        await spool.deliveries.settle("old", claimed)


def config(folder, path):
    file = folder / "gateway.toml"
    file.write_text(
        f'gateway_id = "g"\n[spool]\npath = "{path.name}"\n'
        '[[destinations]]\nname = "new"\nkind = "file"\ndirectory = "out"\n'
    )
    return str(file)


async def test_destinations_are_listed_configured_or_not(tmp_path):
    path = tmp_path / "spool.db"
    await made(path)
    told = json.loads(run("destination", "list", "--config", config(tmp_path, path), "--json").stdout)
    assert [(d["name"], d["configured"], d["backlog_readings"]) for d in told] == [
        ("new", True, 5),
        ("old", False, 0),
    ]
    shown = run("destination", "list", "--spool", str(path))
    assert shown.returncode == 0
    assert "5 records" in shown.stdout


async def test_only_a_destination_that_is_not_configured_is_dropped(tmp_path):
    path = tmp_path / "spool.db"
    await made(path)
    file = config(tmp_path, path)
    still = run("destination", "drop", "new", "-c", file)
    assert (still.returncode, "still configured" in still.stderr) == (2, True)
    assert run("destination", "drop", "old", "-c", file).returncode == 0
    gone = run("destination", "drop", "old", "-c", file)
    assert (gone.returncode, "knows no destination old" in gone.stderr) == (2, True)
    async with open_spool(path) as spool:
        assert (await spool.deliveries.backlog("new")).readings == 5
        inside = run("destination", "drop", "new", "--spool", str(path))
        assert (inside.returncode, "Stop the gateway first" in inside.stderr) == (2, True)


def test_a_spool_that_is_not_there_is_not_made(tmp_path):
    gone = run("destination", "drop", "x", "--spool", str(tmp_path / "none.db"))
    assert gone.returncode == 2
    assert list(tmp_path.iterdir()) == []

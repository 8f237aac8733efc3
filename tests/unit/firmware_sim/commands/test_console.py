"""What the commands of the simulator share."""

import json

from firmware_sim.commands.console import write_progress


def test_progress_is_replaced_whole(tmp_path):
    write_progress(tmp_path, {"produced": 1})
    write_progress(tmp_path, {"produced": 2})
    assert json.loads((tmp_path / "progress.json").read_text()) == {"produced": 2}
    assert [path.name for path in tmp_path.glob(".progress*")] == []

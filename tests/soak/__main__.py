"""`make soak HOURS=n`: run a soak and leave a report."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import time
from pathlib import Path

from tests.soak.run import soak
from tests.support.programs import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--rate", type=float, default=400.0, help="readings per second of the fleet")
    parser.add_argument("--folder", type=Path, default=ROOT / ".build" / "soak", help="emptied first")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    verdict, report, watch = asyncio.run(
        soak(options.folder.resolve(), seconds=options.hours * 3600, seed=options.seed, rate=options.rate)
    )
    lines = [f"soak: BROKEN {what}" for what in watch.violations]
    where = options.folder / "report.md"
    lines.append(f"soak: {verdict} seed={report.seed} faults={len(report.faults)} report={where}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())

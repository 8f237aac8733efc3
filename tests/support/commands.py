"""Many `tidegate` commands in a row, without starting an interpreter for each: one that is warm is forked.

It has printed every `--help` there is, and so has imported what commands import. A command runs as it would
under `python -m gateway`, in a process of its own; exit code 70 is an exception that nothing caught.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]

_RUNNER = """
import contextlib, io, json, os, runpy, signal, sys, tempfile, traceback

def called(words):
    sys.argv = ["tidegate", *words]
    try:
        runpy.run_module("gateway", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0

def helped(words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = called([*words, "--help"])
    return {"code": code, "out": out.getvalue(), "err": ""}

def forked(words, folder, stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if not (child := os.fork()):
            signal.alarm(60)
            os.chdir(folder)
            for here, there in ((os.open(stdin, os.O_RDONLY), 0), (out.fileno(), 1), (err.fileno(), 2)):
                os.dup2(here, there)
            code = called(words)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode(errors="replace"))[1] for file in (out, err)]
    return {"code": code, "out": texts[0], "err": texts[1]}

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    asked = json.loads(line)
    done = helped(**asked) if len(asked) == 1 else forked(**asked)
    print(json.dumps(done), file=answers, flush=True)
"""


class Done(NamedTuple):
    """What came of a command."""

    code: int
    out: str
    err: str


class Commands:
    """Runs commands, each in a folder. `helps` is the help of every command and group, by its words."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000", "NO_COLOR": "1", "TERM": "dumb"},
        )
        self.helps = dict(self._every_help(()))

    def run(self, words: Sequence[str], folder: Path, stdin: str = os.devnull) -> Done:
        return self._ask(words=list(words), folder=str(folder), stdin=stdin)

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def _every_help(self, words: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
        done = self._ask(words=words)
        assert done.code == 0, (words, done)
        listed = re.search(r"─ Commands ─.*?\n(.*?)\n╰", done.out, re.DOTALL)
        names = re.findall(r"^│ (\S+)", listed[1], re.MULTILINE) if listed else []
        return [(words, done.out), *(each for name in names for each in self._every_help((*words, name)))]

    def _ask(self, **asked: Any) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

"""Steps of a plan: each can be shown before it is done."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.runtime.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_OUTPUT_MAX_LINES = 12


class SetupError(Exception):
    """A step failed; the message is for a person. Steps before it stay done."""


class Step(NamedTuple):
    """One step. `text` is an imperative; `run` raises `SetupError` or `OSError`."""

    text: str
    run: Callable[[], None] = lambda: None


def write_file(path: Path, text: str, mode: int = 0o644) -> Step:
    """Write a file as a whole, and its folder."""

    def run() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode(), mode)

    return Step(f"write {path}", run)


def make_link(path: Path, target: Path) -> Step:
    """Make `path` a link to `target`, replacing an existing link in one rename."""

    def run() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.new")
        draft.unlink(missing_ok=True)
        draft.symlink_to(target)
        draft.replace(path)

    return Step(f"link {path} to {target}", run)


def make_folder(path: Path, mode: int) -> Step:
    """Make a folder with this mode."""

    def run() -> None:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)

    return Step(f"make {path} ({mode:04o})", run)


def remove_path(path: Path) -> Step:
    """Remove a file, a link or a folder with everything in it."""

    def run() -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    return Step(f"remove {path}", run)


def run_program(*command: str | Path, text: str = "") -> Step:
    """Run a program to its end."""
    words = [str(word) for word in command]
    return Step(text or "run " + " ".join(words), lambda: _run_to_end(words))


def _run_to_end(words: Sequence[str]) -> None:
    # another Python must not find this one's packages
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(  # noqa: S603 - the plan's own words
            words,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd="/",
        )
    except OSError as error:
        raise SetupError(f"{words[0]}: {error.strerror or error}") from error
    if done.returncode:
        output = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_OUTPUT_MAX_LINES:])
        raise SetupError(f"`{' '.join(words)}` ended with {done.returncode}\n{output}")

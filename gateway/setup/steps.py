"""Steps of a plan: each says in words what it does, and does it when it is told to."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_OUTPUT_MAX_LINES = 12


class SetupError(Exception):
    """A step could not be done; the message is for a person. Steps before it stay done."""


class Step(NamedTuple):
    """One step. `says` is an imperative; `do` raises `SetupFault` or `OSError`."""

    says: str
    do: Callable[[], None] = lambda: None


def write_file(path: Path, text: str, mode: int = 0o644) -> Step:
    """Write a file as a whole, its folder too; one that says the same already is left alone."""

    def do() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.new")
        opened = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        with os.fdopen(opened, "w", encoding="utf-8") as file:
            os.fchmod(opened, mode)
            file.write(text)
            file.flush()
            os.fsync(opened)
        draft.replace(path)

    return Step(f"write {path}", do)


def make_link(path: Path, target: Path) -> Step:
    """Make `path` a link to `target`, in one rename where there is another."""

    def do() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.new")
        draft.unlink(missing_ok=True)
        draft.symlink_to(target)
        draft.replace(path)

    return Step(f"link {path} to {target}", do)


def make_folder(path: Path, mode: int) -> Step:
    """Make a folder."""

    def do() -> None:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)

    return Step(f"make {path} ({mode:04o})", do)


def remove_path(path: Path) -> Step:
    """Remove a file, a link or a folder with everything in it."""

    def do() -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    return Step(f"remove {path}", do)


def run_program(*command: str | Path, says: str = "") -> Step:
    """Run a program to its end."""
    words = [str(word) for word in command]
    return Step(says or "run " + " ".join(words), lambda: _run_to_end(words))


def _run_to_end(words: Sequence[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - the plan's own words
            words,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env=_clean_environment(),
            cwd="/",
        )
    except OSError as fault:
        raise SetupError(f"{words[0]}: {fault.strerror or fault}") from fault
    if done.returncode:
        told = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_OUTPUT_MAX_LINES:])
        raise SetupError(f"`{' '.join(words)}` ended with {done.returncode}\n{told}")


def _clean_environment() -> dict[str, str]:
    """The environment without what would lead another Python to this one's packages."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}

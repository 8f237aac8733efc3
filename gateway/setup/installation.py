"""The plans to install and to remove."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.setup import release, steps
from gateway.setup.layout import PACKAGED_PROGRAM, UNITS, shipped
from gateway.setup.steps import SetupFault, Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from gateway.setup.layout import Layout

_GROUP = "tidegate"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be installed.

    Attributes:
        version: which release.
        wheels: folder with its wheels, None for the package index.
        python: the interpreter it is to run on.
        init: arguments of `tidegate config init` for a configuration that is not there yet.
        config: a file to take as the configuration instead.
        token: the region's token for this gateway, "" for none.
        token_for: a gateway that gets its first token at this region, "" for none.
        dsn: of the region's database, "" for none.
        start: enable the unit and start it, or restart it when it runs.
    """

    version: str
    wheels: Path | None
    python: str
    init: Sequence[str] = ()
    config: Path | None = None
    token: str = ""
    token_for: str = ""
    dsn: str = ""
    start: bool = True


def plan_install(layout: Layout, wanted: Wanted) -> Iterator[Step]:
    """Every step from a bare machine, or from an older release, to a service that runs.

    What is there of configuration and secrets stays as it is.
    """
    yield from release.steps_of(layout, wanted.version, wanted.wheels, wanted.python)
    yield from _system_files(layout)
    yield from _configuration(layout, wanted)
    if layout.is_image:
        yield steps.run("systemctl", f"--root={layout.root}", "enable", layout.unit)
        return
    yield steps.run("systemctl", "daemon-reload")
    if not wanted.start:
        yield Step(f"leave {layout.unit} as it is; start it with `systemctl enable --now {layout.unit}`")
        return
    yield steps.run("systemctl", "enable", layout.unit)
    yield steps.run("systemctl", "restart", layout.unit, says=f"start {layout.unit}, or restart it")


def _system_files(layout: Layout) -> Iterator[Step]:
    for name in UNITS[layout.role]:
        text = shipped(name).replace(PACKAGED_PROGRAM, str(layout.program))
        yield steps.write(layout.at(f"/etc/systemd/system/{name}"), text)
    for kind in ("sysusers", "tmpfiles"):
        path = layout.at(f"/etc/{kind}.d/tidegate.conf")
        yield steps.write(path, shipped(f"tidegate.{kind}.conf"))
        create = ["--create"] if kind == "tmpfiles" else []
        yield steps.run(f"systemd-{kind}", f"--root={layout.root}", *create, path)
    if layout.instance:
        yield steps.folder(layout.at(layout.config_folder / "secrets"), 0o700)
        yield steps.folder(layout.at(layout.config_folder / "tls"), 0o2750)
        if not layout.is_image:
            yield steps.run("chgrp", _GROUP, layout.config_folder / "tls")


def _configuration(layout: Layout, wanted: Wanted) -> Iterator[Step]:
    config = layout.at(layout.config)
    if layout.role == "sim":
        return
    if wanted.token:
        yield steps.write(
            layout.at(layout.config_folder / "secrets/regional.token"), f"{wanted.token}\n", 0o600
        )
    if wanted.dsn:
        yield steps.write(layout.at(layout.config_folder / "dsn"), f"{wanted.dsn}\n", 0o600)
    program = layout.at(layout.prefix) / "releases" / wanted.version / "bin" / "tidegate"
    if config.exists():
        yield Step(f"keep {config}")
    elif wanted.config is not None:
        yield steps.write(config, _text_of(wanted.config))
    elif layout.role == "ingest":
        yield steps.write(config, _INGEST)
    else:
        spool = ("--spool", str(layout.state / "spool.db"))
        yield steps.run(program, "config", "init", config, *spool, *wanted.init, says=f"write {config}")
    if wanted.token_for:
        tokens = layout.at("/etc/tidegate/tls/ingest-tokens")
        yield _first_token(program, tokens, wanted.token_for)


def _first_token(program: Path, tokens: Path, name: str) -> Step:
    path = tokens.with_name(f"{name}.token")
    script = f'umask 077; "{program}" ingest token add "{name}" --tokens-file "{tokens}" >"{path}"'
    return steps.run("/bin/sh", "-c", script, says=f"write a token for {name} to {path}")


def plan_uninstall(layout: Layout, *, purge: bool) -> Iterator[Step]:
    """Stop and remove; the spool and the configuration stay unless `purge`."""
    folder = layout.at("/etc/systemd/system")
    there = [folder / name for names in UNITS.values() for name in names if (folder / name).exists()]
    if not layout.is_image:
        for unit in there:
            yield steps.run("systemctl", "stop", unit.name.replace("@.", "@*."))
    enabled = sorted((folder / "multi-user.target.wants").glob("tidegate-*"))
    ours = [layout.at(f"/etc/{kind}.d/tidegate.conf") for kind in ("sysusers", "tmpfiles")]
    for path in (*enabled, *there, *ours, layout.at(layout.link), layout.at(layout.prefix)):
        if path.exists() or path.is_symlink():
            yield steps.remove(path)
    if not layout.is_image:
        yield steps.run("systemctl", "daemon-reload")
    kept = list(_kept(layout))
    if purge:
        yield from map(steps.remove, kept)
    elif kept:
        yield Step(f"keep {', '.join(map(str, kept))}; --purge removes them, and every reading in them")


def _kept(layout: Layout) -> Iterator[Path]:
    """Configuration, and what services keep: each of systemd's links before the folder that it leads to."""
    for pattern in ("etc/tidegate", "var/lib/tidegate*", "var/lib/private/tidegate*"):
        yield from sorted(layout.root.glob(pattern))


def require(layout: Layout, *, uid: int) -> None:
    """Whether this machine can be set up at all.

    Raises:
        SetupFault: says what is missing.
    """
    if uid != 0 and not layout.is_image:
        raise SetupFault("setting a machine up takes root; --dry-run shows what would be done")
    if shutil.which("systemctl") is None:
        raise SetupFault("this machine has no systemd; run `tidegate gateway --config FILE` with what it has")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise SetupFault(f"{path}: {getattr(fault, 'strerror', None) or fault}") from fault


_INGEST = """\
# The region. Every key and what it is for: config/ingest.toml of the source, docs/region.md.
tokens_file = "tls/ingest-tokens"

[listen]
host = "127.0.0.1"

[database]
dsn_file = "dsn"
"""

"""Plans to install and to remove the program. Where everything goes:

    PREFIX/releases/VERSION   one virtual environment per release, created in place and never changed
    PREFIX/current            symlink to the release in use; switching is one rename
    /usr/local/bin/tidegate   symlink to PREFIX/current/bin/tidegate
    /etc/systemd/system       units that start PREFIX/current/bin/tidegate
    /etc/tidegate             configurations, secrets/ (root only), tls/ (readable by group tidegate)
    /var/lib/tidegate         the spool; created by systemd

With an instance NAME the configuration is in /etc/tidegate/NAME and the spool in /var/lib/tidegate@NAME.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from cloud_sync.runtime.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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


Role = Literal["gateway", "ingest", "sim"]
DEFAULT_PREFIX = Path("/opt/tidegate")
PACKAGED_PROGRAM = "/usr/bin/tidegate"
"""What the shipped units start; an installation puts its own program in its place."""
_COMMAND_LINK = Path("/usr/local/bin/tidegate")


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one installation. `root` is "/", or that of an image that is being built; `prefix`, the folder
    of releases, is as the machine itself will see it; `instance` is "" for the only gateway.
    """

    root: Path = Path("/")
    prefix: Path = DEFAULT_PREFIX
    role: Role = "gateway"
    instance: str = ""

    def locate(self, path: str | Path) -> Path:
        """A path of the machine as it is seen from here."""
        return self.root / Path(path).relative_to("/")

    @property
    def is_image(self) -> bool:
        """Whether another machine's root is being built: none of its programs run here."""
        return self.root != Path("/")

    @property
    def program(self) -> Path:
        """What units and the link on everybody's PATH start."""
        return self.prefix / "current" / "bin" / "tidegate"

    @property
    def unit(self) -> str:
        """The systemd unit."""
        return f"tidegate-{self.role}{f'@{self.instance}' if self.instance else ''}.service"

    @property
    def config_folder(self) -> Path:
        """Configuration and secrets."""
        return Path("/etc/tidegate") / self.instance

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.config_folder / ("ingest.toml" if self.role == "ingest" else "gateway.toml")


def read_shipped_file(name: str) -> str:
    """The text of a shipped file: a unit, or a configuration of systemd-sysusers or -tmpfiles."""
    installed = files("gateway.setup") / "units" / name
    if installed.is_file():
        return installed.read_text(encoding="utf-8")
    return (Path(__file__).parents[2] / "systemd" / name).read_text(encoding="utf-8")


UNIT_FILES: dict[Role, tuple[str, ...]] = {
    "gateway": ("tidegate-gateway.service", "tidegate-gateway@.service"),
    "ingest": ("tidegate-ingest.service",),
    "sim": ("tidegate-sim.service",),
}
"""The unit files of each role."""

ROLE_EXTRAS: dict[Role, str] = {"gateway": "", "ingest": "[ingest]", "sim": "[sim]"}
"""The extra of the distribution that each role needs."""


_WHEEL = re.compile(r"tidegate-(?P<version>[^-]+)-py3-none-any\.whl")
_COMPLETE_MARKER = "complete"


def find_wheel_version(wheels: Path) -> str:
    """The version of the only tidegate wheel in a folder. Raises SetupError."""
    found = sorted(m["version"] for p in wheels.glob("tidegate-*.whl") if (m := _WHEEL.fullmatch(p.name)))
    if len(found) != 1:
        versions = ", ".join(found) or "none"
        raise SetupError(f"{wheels}: expected one tidegate-VERSION-py3-none-any.whl, found {versions}")
    return found[0]


def plan_release(layout: Layout, version: str, wheels: Path | None, python: str) -> Iterator[Step]:
    """Install a release and switch to it; the previous one stays, to go back to.

    `wheels` is a folder with all wheels it needs, None for the package index; `python` the interpreter.
    """
    folder = layout.prefix / "releases" / version
    release = layout.locate(folder)
    marker = release / _COMPLETE_MARKER  # lists the extras of a complete installation
    installed = marker.read_text(encoding="utf-8").split("\n")[:-1] if marker.exists() else []
    extra = ROLE_EXTRAS[layout.role]
    if extra in installed:
        yield Step(f"keep the release in {release}")
    else:
        if not installed:
            if release.exists():
                yield remove_path(release)
            yield run_program(python, "-m", "venv", release, text=f"make a virtual environment in {release}")
        pip = [str(release / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
        source = ["--no-index", "--find-links", str(wheels)] if wheels is not None else []
        text = f"install tidegate{extra} {version} from {wheels or 'the package index'}"
        package = f"tidegate{extra}=={version}"
        yield run_program(*pip, "--only-binary=:all:", *source, package, text=text)
        yield write_file(marker, "\n".join([*installed, extra, ""]))
    yield make_link(layout.locate(layout.prefix / "current"), Path("releases") / version)
    yield make_link(layout.locate(_COMMAND_LINK), layout.program)


_GROUP = "tidegate"


@dataclass(frozen=True, slots=True)
class InstallRequest:
    """What is to be installed: a release from `wheels` or else the package index, run by `python`.

    A configuration is only written where there is none: a copy of `config`, or else by `tidegate config init`
    with the arguments `init`. `token` is the one for the region; at a region, `token_for` is the gateway
    that gets the first one.
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


def plan_install(layout: Layout, request: InstallRequest) -> Iterator[Step]:
    """Every step from a bare machine, or from an older release, to a running service.

    An existing configuration and existing secrets are kept.
    """
    yield from plan_release(layout, request.version, request.wheels, request.python)
    yield from _plan_system_files(layout)
    yield from _plan_configuration(layout, request)
    if layout.is_image:
        yield run_program("systemctl", f"--root={layout.root}", "enable", layout.unit)
        return
    yield run_program("systemctl", "daemon-reload")
    if not request.start:
        yield Step(f"do not start {layout.unit}; start it with `systemctl enable --now {layout.unit}`")
        return
    yield run_program("systemctl", "enable", layout.unit)
    yield run_program("systemctl", "restart", layout.unit, text=f"start {layout.unit}, or restart it")


def _plan_system_files(layout: Layout) -> Iterator[Step]:
    for name in UNIT_FILES[layout.role]:
        text = read_shipped_file(name).replace(PACKAGED_PROGRAM, str(layout.program))
        yield write_file(layout.locate(f"/etc/systemd/system/{name}"), text)
    for kind in ("sysusers", "tmpfiles"):
        path = layout.locate(f"/etc/{kind}.d/tidegate.conf")
        yield write_file(path, read_shipped_file(f"tidegate.{kind}.conf"))
        create = ["--create"] if kind == "tmpfiles" else []
        yield run_program(f"systemd-{kind}", f"--root={layout.root}", *create, path)
    if layout.instance:
        yield make_folder(layout.locate(layout.config_folder / "secrets"), 0o700)
        yield make_folder(layout.locate(layout.config_folder / "tls"), 0o2750)
        if not layout.is_image:
            yield run_program("chgrp", _GROUP, layout.config_folder / "tls")


def _plan_configuration(layout: Layout, request: InstallRequest) -> Iterator[Step]:
    config = layout.locate(layout.config)
    if layout.role == "sim":
        return
    if request.token:
        token_file = layout.locate(layout.config_folder / "secrets/regional.token")
        yield write_file(token_file, f"{request.token}\n", 0o600)
    if request.dsn:
        yield write_file(layout.locate(layout.config_folder / "dsn"), f"{request.dsn}\n", 0o600)
    program = layout.locate(layout.prefix) / "releases" / request.version / "bin" / "tidegate"
    if config.exists():
        yield Step(f"keep {config}")
    elif request.config is not None:
        yield write_file(config, request.config.read_text(encoding="utf-8"))
    elif layout.role == "ingest":
        yield write_file(config, _INGEST_CONFIG)
    else:
        state = f"/var/lib/tidegate@{layout.instance}" if layout.instance else "/var/lib/tidegate"
        spool = ("--spool", f"{state}/spool.db")
        yield run_program(program, "config", "init", config, *spool, *request.init, text=f"write {config}")
    if request.token_for:
        tokens = layout.locate("/etc/tidegate/tls/ingest-tokens")
        name, path = request.token_for, tokens.with_name(f"{request.token_for}.token")
        script = f'umask 077; "{program}" ingest token add "{name}" --tokens-file "{tokens}" >"{path}"'
        yield run_program("/bin/sh", "-c", script, text=f"write a token for {name} to {path}")


def plan_uninstall(layout: Layout, *, purge: bool) -> Iterator[Step]:
    """Stop and remove everything; spool and configuration are kept unless `purge`."""
    folder = layout.locate("/etc/systemd/system")
    units = [folder / name for names in UNIT_FILES.values() for name in names if (folder / name).exists()]
    if not layout.is_image:
        for unit in units:
            yield run_program("systemctl", "stop", unit.name.replace("@.", "@*."))
    enabled = sorted((folder / "multi-user.target.wants").glob("tidegate-*"))
    ours = [layout.locate(f"/etc/{kind}.d/tidegate.conf") for kind in ("sysusers", "tmpfiles")]
    for path in (*enabled, *units, *ours, layout.locate(_COMMAND_LINK), layout.locate(layout.prefix)):
        if path.exists() or path.is_symlink():
            yield remove_path(path)
    if not layout.is_image:
        yield run_program("systemctl", "daemon-reload")
    # systemd's links in /var/lib before the folders that they point to
    patterns = ("etc/tidegate", "var/lib/tidegate*", "var/lib/private/tidegate*")
    persistent = [path for pattern in patterns for path in sorted(layout.root.glob(pattern))]
    if purge:
        yield from map(remove_path, persistent)
    elif persistent:
        names = ", ".join(map(str, persistent))
        yield Step(f"keep {names}; --purge removes them, and every reading in them")


def check_prerequisites(layout: Layout, *, uid: int) -> None:
    """Raise SetupError unless the program can be installed here."""
    if uid != 0 and not layout.is_image:
        raise SetupError("this needs root; --dry-run shows what would be done")
    if shutil.which("systemctl") is None:
        raise SetupError("this machine has no systemd; start `tidegate gateway --config FILE` otherwise")


_INGEST_CONFIG = """\
# The ingest service of a region. All keys: config/ingest.toml of the source, docs/region.md.
tokens_file = "tls/ingest-tokens"

[listen]
host = "127.0.0.1"

[database]
dsn_file = "dsn"
"""

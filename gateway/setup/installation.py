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

import re
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gateway.setup import steps
from gateway.setup.steps import SetupError, Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Role = Literal["gateway", "ingest", "sim"]
DEFAULT_PREFIX = Path("/opt/tidegate")
PACKAGED_PROGRAM = "/usr/bin/tidegate"
"""What the shipped units start; an installation puts its own program in the place."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one installation, below `root`.

    Attributes:
        root: "/", or the root of an image that is being built.
        prefix: where releases go, as the machine itself will see it.
        role: what is installed.
        instance: of a gateway, "" for the only one.
    """

    root: Path = Path("/")
    prefix: Path = DEFAULT_PREFIX
    role: Role = "gateway"
    instance: str = ""

    def at(self, path: str | Path) -> Path:
        """A path of the machine as it is seen from here."""
        return self.root / Path(path).relative_to("/")

    @property
    def is_image(self) -> bool:
        """Whether another machine's root is being built: nothing of it runs here."""
        return self.root != Path("/")

    @property
    def program(self) -> Path:
        """What units and the link in /usr/local/bin start."""
        return self.prefix / "current" / "bin" / "tidegate"

    @property
    def link(self) -> Path:
        """The command on everybody's PATH."""
        return Path("/usr/local/bin/tidegate")

    @property
    def unit(self) -> str:
        """The unit's name."""
        return f"tidegate-{self.role}{f'@{self.instance}' if self.instance else ''}.service"

    @property
    def config_folder(self) -> Path:
        """Configuration and secrets."""
        return Path("/etc/tidegate") / self.instance

    @property
    def config(self) -> Path:
        """The configuration's file."""
        return self.config_folder / ("ingest.toml" if self.role == "ingest" else "gateway.toml")

    @property
    def state(self) -> Path:
        """What the service keeps."""
        suffix = f"@{self.instance}" if self.instance else "" if self.role == "gateway" else f"-{self.role}"
        return Path(f"/var/lib/tidegate{suffix}")


def read_shipped_file(name: str) -> str:
    """The text of a file that comes with the program: a unit, or what systemd-sysusers and -tmpfiles read."""
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
"""What of the distribution each role needs."""


_WHEEL = re.compile(r"tidegate-(?P<version>[^-]+)-py3-none-any\.whl")
_COMPLETE_MARKER = "complete"


def find_wheel_version(wheels: Path) -> str:
    """The version of the only tidegate wheel in a folder.

    Raises:
        SetupFault: there is none, or more than one.
    """
    found = sorted(m["version"] for p in wheels.glob("tidegate-*.whl") if (m := _WHEEL.fullmatch(p.name)))
    if len(found) != 1:
        raise SetupError(
            f"{wheels}: expected one tidegate-VERSION-py3-none-any.whl, found {', '.join(found) or 'none'}"
        )
    return found[0]


def plan_release(layout: Layout, version: str, wheels: Path | None, python: str) -> Iterator[Step]:
    """Make a release and lead to it. The one before stays, to go back to.

    Args:
        layout: where.
        version: which release.
        wheels: folder with all wheels it needs; None asks the package index.
        python: the interpreter that it is to run on.
    """
    home = layout.prefix / "releases" / version
    there = layout.at(home)
    have = _installed_extras(there)
    wanted = ROLE_EXTRAS[layout.role]
    if wanted in have:
        yield Step(f"keep the release in {there}")
    else:
        if not have:
            if there.exists():
                yield steps.remove_path(there)
            yield steps.run_program(
                python, "-m", "venv", there, says=f"make a virtual environment in {there}"
            )
        yield from _plan_pip_install(there, version, wanted, wheels)
        yield steps.write_file(there / _COMPLETE_MARKER, "\n".join([*have, wanted, ""]))
    yield steps.make_link(layout.at(layout.prefix / "current"), Path("releases") / version)
    yield steps.make_link(layout.at(layout.link), layout.program)


def _plan_pip_install(there: Path, version: str, extra: str, wheels: Path | None) -> Iterator[Step]:
    pip = [str(there / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    source = ["--no-index", "--find-links", str(wheels)] if wheels is not None else []
    says = f"install tidegate{extra} {version} from {wheels or 'the package index'}"
    yield steps.run_program(*pip, "--only-binary=:all:", *source, f"tidegate{extra}=={version}", says=says)


def _installed_extras(there: Path) -> list[str]:
    """For which extras a release has been completed; [] when it is not complete."""
    try:
        return (there / _COMPLETE_MARKER).read_text(encoding="utf-8").split("\n")[:-1]
    except OSError:
        return []


def list_releases(layout: Layout) -> list[str]:
    """Versions that are there and complete."""
    folder = layout.at(layout.prefix / "releases")
    return sorted(p.name for p in folder.glob("*") if _installed_extras(p)) if folder.is_dir() else []


_GROUP = "tidegate"


@dataclass(frozen=True, slots=True)
class InstallRequest:
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


def plan_install(layout: Layout, wanted: InstallRequest) -> Iterator[Step]:
    """Every step from a bare machine, or from an older release, to a service that runs.

    What is there of configuration and secrets stays as it is.
    """
    yield from plan_release(layout, wanted.version, wanted.wheels, wanted.python)
    yield from _plan_system_files(layout)
    yield from _plan_configuration(layout, wanted)
    if layout.is_image:
        yield steps.run_program("systemctl", f"--root={layout.root}", "enable", layout.unit)
        return
    yield steps.run_program("systemctl", "daemon-reload")
    if not wanted.start:
        yield Step(f"leave {layout.unit} as it is; start it with `systemctl enable --now {layout.unit}`")
        return
    yield steps.run_program("systemctl", "enable", layout.unit)
    yield steps.run_program("systemctl", "restart", layout.unit, says=f"start {layout.unit}, or restart it")


def _plan_system_files(layout: Layout) -> Iterator[Step]:
    for name in UNIT_FILES[layout.role]:
        text = read_shipped_file(name).replace(PACKAGED_PROGRAM, str(layout.program))
        yield steps.write_file(layout.at(f"/etc/systemd/system/{name}"), text)
    for kind in ("sysusers", "tmpfiles"):
        path = layout.at(f"/etc/{kind}.d/tidegate.conf")
        yield steps.write_file(path, read_shipped_file(f"tidegate.{kind}.conf"))
        create = ["--create"] if kind == "tmpfiles" else []
        yield steps.run_program(f"systemd-{kind}", f"--root={layout.root}", *create, path)
    if layout.instance:
        yield steps.make_folder(layout.at(layout.config_folder / "secrets"), 0o700)
        yield steps.make_folder(layout.at(layout.config_folder / "tls"), 0o2750)
        if not layout.is_image:
            yield steps.run_program("chgrp", _GROUP, layout.config_folder / "tls")


def _plan_configuration(layout: Layout, wanted: InstallRequest) -> Iterator[Step]:
    config = layout.at(layout.config)
    if layout.role == "sim":
        return
    if wanted.token:
        yield steps.write_file(
            layout.at(layout.config_folder / "secrets/regional.token"), f"{wanted.token}\n", 0o600
        )
    if wanted.dsn:
        yield steps.write_file(layout.at(layout.config_folder / "dsn"), f"{wanted.dsn}\n", 0o600)
    program = layout.at(layout.prefix) / "releases" / wanted.version / "bin" / "tidegate"
    if config.exists():
        yield Step(f"keep {config}")
    elif wanted.config is not None:
        yield steps.write_file(config, _read_config_text(wanted.config))
    elif layout.role == "ingest":
        yield steps.write_file(config, _INGEST_CONFIG)
    else:
        spool = ("--spool", str(layout.state / "spool.db"))
        yield steps.run_program(
            program, "config", "init", config, *spool, *wanted.init, says=f"write {config}"
        )
    if wanted.token_for:
        tokens = layout.at("/etc/tidegate/tls/ingest-tokens")
        yield _plan_first_token(program, tokens, wanted.token_for)


def _plan_first_token(program: Path, tokens: Path, name: str) -> Step:
    path = tokens.with_name(f"{name}.token")
    script = f'umask 077; "{program}" ingest token add "{name}" --tokens-file "{tokens}" >"{path}"'
    return steps.run_program("/bin/sh", "-c", script, says=f"write a token for {name} to {path}")


def plan_uninstall(layout: Layout, *, purge: bool) -> Iterator[Step]:
    """Stop and remove; the spool and the configuration stay unless `purge`."""
    folder = layout.at("/etc/systemd/system")
    there = [folder / name for names in UNIT_FILES.values() for name in names if (folder / name).exists()]
    if not layout.is_image:
        for unit in there:
            yield steps.run_program("systemctl", "stop", unit.name.replace("@.", "@*."))
    enabled = sorted((folder / "multi-user.target.wants").glob("tidegate-*"))
    ours = [layout.at(f"/etc/{kind}.d/tidegate.conf") for kind in ("sysusers", "tmpfiles")]
    for path in (*enabled, *there, *ours, layout.at(layout.link), layout.at(layout.prefix)):
        if path.exists() or path.is_symlink():
            yield steps.remove_path(path)
    if not layout.is_image:
        yield steps.run_program("systemctl", "daemon-reload")
    kept = list(_persistent_paths(layout))
    if purge:
        yield from map(steps.remove_path, kept)
    elif kept:
        yield Step(f"keep {', '.join(map(str, kept))}; --purge removes them, and every reading in them")


def _persistent_paths(layout: Layout) -> Iterator[Path]:
    """Configuration, and what services keep: each of systemd's links before the folder that it leads to."""
    for pattern in ("etc/tidegate", "var/lib/tidegate*", "var/lib/private/tidegate*"):
        yield from sorted(layout.root.glob(pattern))


def check_prerequisites(layout: Layout, *, uid: int) -> None:
    """Whether this machine can be set up at all.

    Raises:
        SetupFault: says what is missing.
    """
    if uid != 0 and not layout.is_image:
        raise SetupError("setting a machine up takes root; --dry-run shows what would be done")
    if shutil.which("systemctl") is None:
        raise SetupError("this machine has no systemd; run `tidegate gateway --config FILE` with what it has")


def _read_config_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise SetupError(f"{path}: {getattr(fault, 'strerror', None) or fault}") from fault


_INGEST_CONFIG = """\
# The region. Every key and what it is for: config/ingest.toml of the source, docs/region.md.
tokens_file = "tls/ingest-tokens"

[listen]
host = "127.0.0.1"

[database]
dsn_file = "dsn"
"""

"""Where everything goes on a machine.

    PREFIX/releases/VERSION   a virtual environment for each release, made in place and never changed
    PREFIX/current            the release in use; changing it is one rename, back as well as forth
    /usr/local/bin/tidegate   leads to PREFIX/current/bin/tidegate
    /etc/systemd/system       units, with PREFIX/current/bin/tidegate in them
    /etc/tidegate             configurations, secrets/ (root only), tls/ (readable by group tidegate)
    /var/lib/tidegate         the spool; made by systemd

With an instance NAME the configuration is in /etc/tidegate/NAME and the spool in /var/lib/tidegate@NAME.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

Role = Literal["gateway", "ingest", "sim"]
PREFIX = Path("/opt/tidegate")
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
    prefix: Path = PREFIX
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


def shipped(name: str) -> str:
    """The text of a file that comes with the program: a unit, or what systemd-sysusers and -tmpfiles read."""
    installed = files("gateway.setup") / "units" / name
    if installed.is_file():
        return installed.read_text(encoding="utf-8")
    return (Path(__file__).parents[2] / "systemd" / name).read_text(encoding="utf-8")


UNITS: dict[Role, tuple[str, ...]] = {
    "gateway": ("tidegate-gateway.service", "tidegate-gateway@.service"),
    "ingest": ("tidegate-ingest.service",),
    "sim": ("tidegate-sim.service",),
}
"""The unit files of each role."""

EXTRAS: dict[Role, str] = {"gateway": "", "ingest": "[ingest]", "sim": "[sim]"}
"""What of the distribution each role needs."""

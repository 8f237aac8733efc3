"""A machine of its own: systemd booted in a container on this machine's /usr, everything else empty.

The root holds nothing but what it takes to boot, so only what a test installs runs in it. /usr is an overlay:
what is written there stays in the test's folder. The network is its own and has nothing but loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.support.programs import wait_until

UNIT = "tidegate-gateway.service"
_OWN = ("passwd", "group", "shadow", "nsswitch.conf", "ld.so.cache", "os-release")


class Machine:
    """One container; `root` is its file system seen from here, `said` what its set-up printed."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.said = ""
        self._upper = folder / "usr"
        self._log = folder / "console.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._pid = 0
        for name in (
            "etc/systemd/system",
            "usr",
            "var/lib",
            "tmp",
            "root",
            "opt",
            "proc",
            "sys",
            "dev",
            "run",
        ):
            (self.root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        for name in _OWN:
            shutil.copy(f"/etc/{name}", self.root / "etc" / name)
        shutil.copytree(
            "/etc/ssl", self.root / "etc/ssl", symlinks=True, ignore=shutil.ignore_patterns("private")
        )
        (self.root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
        (self.root / "etc/hostname").write_text("box\n")
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n")
        self._upper.mkdir()

    def boot(self) -> None:
        """Start it, and wait until its systemd has started everything."""
        with self._log.open("ab") as log:
            self._nspawn = subprocess.Popen(
                [
                    *("systemd-nspawn", "--directory", self.root, "--boot", "--private-network"),
                    *("--register=no", "--keep-unit", "--console=pipe", f"--machine=tg-{os.getpid()}"),
                    f"--overlay=/usr:{self._upper}:/usr",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._has_booted, 30, lambda: self._log.read_text()[-2000:])

    def _has_booted(self) -> bool:
        assert self._nspawn is not None
        assert self._nspawn.poll() is None, self._log.read_text()[-2000:]
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        if not children:
            return False
        self._pid = int(children[0])
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 90, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside, as its root."""
        inside = ("nsenter", "-t", str(self._pid), "-m", "-u", "-i", "-n", "-p", "-C", "--")
        environment = {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin", "LANG": "C.UTF-8", "HOME": "/root"}
        done = subprocess.run(
            [*inside, *map(str, command)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=environment,
            cwd="/",
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done

    def beside(self, *command: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start a program of this machine that only shares the network of the container."""
        return subprocess.Popen(["nsenter", "-t", str(self._pid), "-n", "--", *map(str, command)], **options)

    def systemctl(self, *words: str, check: bool = True) -> str:
        return self.run("systemctl", *words, check=check).stdout.strip()

    def property(self, name: str, unit: str = UNIT) -> str:
        """One property of a unit, as systemd knows it now."""
        return self.systemctl("show", "--property", name, "--value", unit)

    def journal(self, unit: str = UNIT, *options: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}", *options).stdout

    def drop_in(self, name: str, *lines: str, unit: str = UNIT) -> None:
        """Change a unit, as `systemctl edit` does."""
        folder = self.root / f"etc/systemd/system/{unit}.d"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.conf").write_text("\n".join(["[Service]", *lines, ""]))
        self.systemctl("daemon-reload")

    def undo(self, name: str, unit: str = UNIT) -> None:
        (self.root / f"etc/systemd/system/{unit}.d/{name}.conf").unlink()
        self.systemctl("daemon-reload")

    def http(self, path: str, port: int = 8421) -> tuple[int, dict[str, Any]]:
        """GET from the gateway inside: the status and the document."""
        script = (
            "import sys,urllib.request as u,urllib.error as e\n"
            f"try: a=u.urlopen('http://127.0.0.1:{port}{path}',timeout=5)\n"
            "except e.HTTPError as f: a=f\n"
            "sys.stdout.write(f'{a.status}\\n'+a.read().decode())"
        )
        code, _, body = self.run("/usr/bin/python3", "-c", script).stdout.partition("\n")
        return int(code), json.loads(body)

    def publish(self, topic: str, value: float, *, port: int = 1883, timeout: float = 10) -> bool:
        """Publish a reading with QoS 1; whether it was acknowledged in time."""
        payload = json.dumps({"value": value})
        command = ("mosquitto_pub", "-p", str(port), "-q", "1", "-t", topic, "-m", payload)
        try:
            return self.run(*command, check=False, timeout=timeout).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def power_off(self) -> None:
        """Stop it in order, or by force."""
        if self._nspawn is None:
            return
        if self._pid:
            os.kill(self._pid, signal.SIGRTMIN + 4)  # systemd(1): poweroff.target
        try:
            self._nspawn.wait(20)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
        self._nspawn = None


def until(true: Any, within_s: float, machine: Machine, unit: str = UNIT) -> float:
    """Wait for something; says what the unit's journal says when it does not come. Returns the seconds."""
    started = time.monotonic()
    wait_until(
        true, within_s, lambda: machine.systemctl("status", unit, check=False) + machine.journal(unit)[-3000:]
    )
    return time.monotonic() - started

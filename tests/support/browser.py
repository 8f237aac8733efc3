"""A headless Chromium of a test's own, driven by its DevTools protocol over a pair of pipes.

Only what the tests need: open a page, evaluate, press keys, take pictures, and what went wrong meanwhile.
Source: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_PATIENCE_S = 30.0
_KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "ArrowUp": (38, ""),
    "ArrowDown": (40, ""),
    "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
    "Home": (36, ""),
}


class Page:
    """The one tab.

    Attributes:
        complaints: exceptions, and what the console and the browser's log said as a warning or an error.
        requests: every address the page has asked for.
    """

    def __init__(self, process: subprocess.Popen[bytes], read_fd: int, write_fd: int) -> None:
        self._process = process
        self._read_fd, self._write_fd = read_fd, write_fd
        self._buffer = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self._send("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True})[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, to the tab."""
        return self._send(method, parameters, self._session)

    def look(
        self,
        *,
        width: int = 1200,
        height: int = 900,
        scheme: Literal["light", "dark"] = "light",
        motion: Literal["reduce", "no-preference"] = "no-preference",
    ) -> None:
        """Set the size of the window and what the person prefers."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.ask("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """Go to a page and wait for its load event."""
        for address in ("about:blank", url):  # a page is not loaded again for another fragment
            self._events.clear()
            self.ask("Page.navigate", url=address)
            self._wait_for_event("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression; a promise is waited for."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """The text of the first element of a selector, as it is rendered."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def wait_until(self, expression: str, within_s: float = _PATIENCE_S) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + within_s
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {within_s} s: {expression}; {self.complaints}")
            time.sleep(0.05)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press one key."""
        code, text = _KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.ask("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type into whatever has the focus."""
        self.ask("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Take a picture of the page as PNG."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def accessibility_tree(self) -> list[dict[str, Any]]:
        """Role, name and value of everything that a screen reader meets."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        return [
            {
                "role": node.get("role", {}).get("value", ""),
                "name": node.get("name", {}).get("value", ""),
                "value": node.get("value", {}).get("value", ""),
                "focusable": any(
                    p["name"] == "focusable" and p["value"].get("value") for p in node.get("properties", ())
                ),
            }
            for node in nodes
            if not node.get("ignored")
        ]

    def _send(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _wait_for_event(self, method: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not any(event["method"] == method for event in self._events):
            assert time.monotonic() < deadline, method
            self._note(self._receive())

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read_fd], [], [], max(0, deadline - time.monotonic()))
            piece = os.read(self._read_fd, 1 << 20) if ready else b""
            if not piece:
                raise AssertionError(f"the browser does not answer; exit code {self._process.poll()}")
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        method, given = event["method"], event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(given["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("warning", "error", "assert"):
            self.complaints.append(str([a.get("value", a) for a in given["args"]]))
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("warning", "error"):
            self.complaints.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A browser with an empty profile in a folder; gone when the context ends."""
    assert EXECUTABLE is not None
    to_read, to_write = os.pipe(), os.pipe()

    def take_pipes() -> None:
        os.dup2(to_write[0], 203)
        os.dup2(to_read[1], 204)
        os.dup2(203, 3)
        os.dup2(204, 4)

    process = subprocess.Popen(
        [
            EXECUTABLE,
            "--headless=new",
            "--remote-debugging-pipe",
            *(("--no-sandbox",) if os.getuid() == 0 else ()),
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            "--lang=en-GB",
            f"--user-data-dir={folder}",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(3, 4),
        preexec_fn=take_pipes,  # noqa: PLW1509 - only file descriptors are moved
        start_new_session=True,
        env={**os.environ, "TZ": "Europe/Berlin", "LANG": "en_GB.UTF-8"},
    )
    os.close(to_write[0])
    os.close(to_read[1])
    try:
        yield Page(process, to_read[0], to_write[1])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all its children: the profile is thrown away
        process.wait()
        os.close(to_read[0])
        os.close(to_write[1])

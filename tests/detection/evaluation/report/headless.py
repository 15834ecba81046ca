"""A headless Chromium for tests, driven over a pipe by the DevTools protocol: no port, no driver to install.

The browser is $RESBACKBONE_CHROMIUM, else the first of the usual names on PATH, else the newest that Playwright has installed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", "--no-first-run")
TIMEOUT_S = 60


def find_chromium() -> str | None:
    """The browser's path, or None."""
    named = os.environ.get("RESBACKBONE_CHROMIUM")
    if named:
        return named
    on_path = next((path for name in NAMES if (path := shutil.which(name))), None)
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    installed = sorted(path for name in ("headless_shell", "chrome-headless-shell", "chrome") for path in cache.glob(f"chromium*/*/{name}"))
    return on_path or (str(installed[-1]) if installed else None)


class Page:
    """One tab. Everything the page logs, warns of or throws, and every address it asks for, is kept."""

    def __init__(self, write_to: int, read_from: int) -> None:
        self._write_to, self._read_from, self._buffer, self._number, self._session = write_to, read_from, b"", 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self._send("Target.createTarget", url="about:blank", width=1360, height=900)["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self._send(f"{domain}.enable")

    def open(self, path: Path, *, ready: str) -> float:
        """Load a file and wait until the expression `ready` is true; returns seconds."""
        start = time.perf_counter()
        self._send("Page.navigate", url=path.resolve().as_uri())
        while not self.run(f"document.documentElement !== null && Boolean({ready})"):
            assert time.perf_counter() - start < TIMEOUT_S, f"{path} is not ready: {self.complaints}"
        return time.perf_counter() - start

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Scroll the first element of a CSS selector into view and press the mouse in its middle."""
        place = self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); if (!one) return null;"
            "one.scrollIntoView({block: 'center', behavior: 'instant'}); const box = one.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        assert place is not None, f"there is no {selector}"
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        """One key of the keyboard, by its DevTools name and Windows code."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def emulate(self, *, width: int = 1360, height: int = 900, dark: bool = False, scale: float = 1.0) -> None:
        """The window's size in CSS pixels and the system's theme."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self, path: Path) -> None:
        """A PNG of the window."""
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def _send(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read_from, 1 << 20)
            assert part, "the browser is gone"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, values = event.get("method", ""), event.get("params", {})
        if method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert")
        ):
            self.complaints.append(json.dumps(values)[:600])
        if method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.complaints.append(json.dumps(values["entry"])[:600])
        if method == "Network.requestWillBeSent" and not values["request"]["url"].startswith("data:"):
            self.requests.append(values["request"]["url"])


@contextlib.contextmanager
def chromium(program: str, profile: Path) -> Iterator[Page]:
    """A page in a browser of its own, which is ended afterwards. profile: an empty folder for it."""
    (browser_reads, we_write), (we_read, browser_writes) = os.pipe(), os.pipe()

    def place_pipes() -> None:  # the protocol's are descriptors 3 and 4; copies first, as one may be in the other's place
        incoming, outgoing = os.dup(browser_reads), os.dup(browser_writes)
        incoming, outgoing = (os.dup2(one, 90 + n) for n, one in enumerate((incoming, outgoing)))
        os.dup2(incoming, 3)
        os.dup2(outgoing, 4)

    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={profile}"],
        preexec_fn=place_pipes,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(browser_reads)
    os.close(browser_writes)
    try:
        yield Page(we_write, we_read)
    finally:
        process.terminate()
        process.wait(20)
        os.close(we_write)
        os.close(we_read)

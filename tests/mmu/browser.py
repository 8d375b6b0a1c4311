"""A real Chromium without a window, driven by the W3C's WebDriver protocol: no library needed for that."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "no Chromium: apt install chromium chromium-driver"
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
# A loaded machine of two cores.
_SECONDS = 60


class Browser:
    """One window. `with` closes it."""

    def __init__(self, width: int = 1600, height: int = 1000) -> None:
        assert not MISSING, MISSING
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._url = f"http://127.0.0.1:{port}"
        self._driver = subprocess.Popen(
            [str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._wait_for_driver()
            args = [*_OPTIONS, f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]
            chrome = {"args": args, "binary": CHROMIUM}
            wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._end()
            raise
        self._url += f"/session/{session['sessionId']}"

    def _wait_for_driver(self) -> None:
        end = time.monotonic() + _SECONDS
        while True:
            try:
                self._call("GET", "/status")
            except urllib.error.URLError:
                assert time.monotonic() < end, "chromedriver does not answer"
                time.sleep(0.05)
            else:
                return

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(  # noqa: S310
            self._url + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a page and wait until it says that it is ready."""
        self._call("POST", "/url", {"url": "about:blank"})
        self._call("POST", "/url", {"url": f"{path.as_uri()}#{fragment}"})
        self.wait("document.documentElement.dataset.ready")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + _SECONDS
        while not self.js(f"return !!({condition})"):
            assert time.monotonic() < end, f"{condition} never; {self.log()}"
            time.sleep(0.05)

    def js(self, code: str, *args: object) -> Any:
        """Run the body of a function in the page; return what it returns."""
        return self._call("POST", "/execute/sync", {"script": code, "args": args})

    def text(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0]).textContent", selector))

    def click(self, x: float, y: float) -> None:
        """Move the mouse there and click, as a hand would."""
        move = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        press = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        source = {"type": "pointer", "id": "mouse", "actions": [move, *press]}
        self._call("POST", "/actions", {"actions": [source]})

    def click_element(self, selector: str) -> None:
        code = (
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'nearest'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
        )
        self.click(*self.js(code, selector))

    def type(self, selector: str, text: str) -> None:
        """Put the caret into a field, type, and press Enter."""
        self.js("const e = document.querySelector(arguments[0]); e.focus(); e.select()", selector)
        keys = [{"type": kind, "value": c} for c in f"{text}\ue007" for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def log(self) -> list[str]:
        """Return what the console has said since the last call; errors of loading, too."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def _end(self) -> None:
        self._driver.terminate()
        self._driver.wait()
        self._profile.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._end()

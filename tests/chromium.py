"""A real Chromium through chromedriver's WebDriver interface (W3C), which is JSON over HTTP: no package is needed."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "needs chromium and chromedriver: apt-get install chromium-driver"
START_S = 120.0
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window of a browser with its own storage."""

    def __init__(self, address: str, width: int, height: int) -> None:
        options = {
            "binary": CHROMIUM,
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--window-size={width},{height}",
            ],
        }
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        self._at = f"{address}/session"
        self._at += "/" + self._call("POST", "", wanted)["sessionId"]

    def open(self, url: str) -> None:
        """Go to an address, and wait until it is there."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script in the page returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def wait(self, condition: str, seconds: float = 60.0) -> Any:
        """Wait until an expression in the page is true, and return it; raises TimeoutError."""
        until = time.monotonic() + seconds
        while not (found := self.run(f"return {condition}")):
            if time.monotonic() > until:
                raise TimeoutError(f"{condition} did not become true; the page says {self.text('body')!r}")
            time.sleep(0.05)
        return found

    def text(self, selector: str) -> str:
        """What a person reads in the first element of a CSS selector."""
        return str(self._call("GET", f"/element/{self._find(selector)}/text"))

    def click(self, selector: str) -> None:
        """Click on the first element of a CSS selector."""
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def press(self, keys: str) -> None:
        """Press keys one after the other."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def screenshot(self, path: Path) -> None:
        """Write what is shown as a PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        """End the window."""
        self._call("DELETE", "")

    def _find(self, selector: str) -> str:
        return str(self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT])

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._at + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            return json.load(answer)["value"]


@contextmanager
def browsers(count: int, width: int = 1200, height: int = 900) -> Iterator[list[Browser]]:
    """Give windows, each with its own storage; all of them are gone afterwards."""
    assert DRIVER is not None, MISSING
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    opened: list[Browser] = []
    try:
        assert driver.stdout is not None
        ports = (re.search(r"on port (\d+)\.", line) for line in driver.stdout)
        port = next(found.group(1) for found in ports if found is not None)
        for _ in range(count):
            opened.append(Browser(f"http://127.0.0.1:{port}", width, height))
        yield opened
    finally:
        for browser in opened:
            browser.close()
        driver.terminate()
        driver.communicate()

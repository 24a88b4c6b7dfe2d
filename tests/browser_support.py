"""A headless Chromium, driven through the Chrome DevTools protocol over two pipes: no port, no driver."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = [
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm is small in containers
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
]
_LIMIT_S = 60.0
_CODES = {"ArrowUp": 38, "ArrowDown": 40, "PageUp": 33, "PageDown": 34, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}


class Browser:
    """One page in one Chromium.

    Attributes:
        requests: The URL of everything that the page asked for.
        said: What the page wrote to the console, and what the browser complained of.
    """

    def __init__(self, width: int = 1600, height: int = 1000, flags: Sequence[str] = ()) -> None:
        self.requests: list[str] = []
        self.said: list[str] = []
        self._count, self._rest = 0, b""
        self._profile = tempfile.mkdtemp()
        child_reads, self._out = os.pipe()
        self._in, child_writes = os.pipe()
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        # The browser speaks on descriptors 3 and 4; bash can put them there without code between fork and exec.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{child_reads} 4>&{child_writes}', "bash", CHROMIUM, *_FLAGS, *flags, *root,
             f"--user-data-dir={self._profile}", f"--window-size={width},{height}", "about:blank"],
            pass_fds=(child_reads, child_writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(child_reads)
        os.close(child_writes)
        self._session: str | None = None
        self._session = self._attach(width, height)

    def _attach(self, width: int, height: int) -> str:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = session
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        return session

    def call(self, method: str, **parameters) -> dict:
        """One command of the protocol and its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._rest:
            part = os.read(self._in, 2**20)
            assert part, "the browser ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        parameters = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif message.get("method") == "Log.entryAdded":
            self.said.append(parameters["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.said.append(parameters["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.said.append(str(parameters["args"]))
        return message

    def open(self, path: Path) -> None:
        """Open a file and wait until its viewer is ready or has failed."""
        self.requests.clear()
        self.said.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("document.readyState === 'complete' && !!document.body.dataset.state")
        self.settle()

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + _LIMIT_S
        while not self.value(f"!!({condition})"):
            assert time.monotonic() < end, f"still not: {condition}; the page said {self.said}"
            time.sleep(0.05)

    def settle(self) -> None:
        """Wait for two frames, so that what was asked for is drawn."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def value(self, expression: str):
        """What a JavaScript expression (or the promise that it gives) is."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name: str) -> None:
        """Press and release a key."""
        facts = {"key": name, "windowsVirtualKeyCode": _CODES.get(name, ord(name[0].upper()))}
        typed = {"text": name} if len(name) == 1 else {"text": "\r"} if name == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)
        self.settle()

    def wheel(self, x: float, y: float, delta: float) -> None:
        """Turn the wheel at a place of the page; 100 is a notch towards the person."""
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)
        self.settle()

    def click(self, x: float, y: float, times: int = 1) -> None:
        """Click at a place of the page."""
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                buttons = int(kind == "mousePressed")
                self.call(
                    "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=count
                )
        self.settle()

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        self._session = None
        os.close(self._out)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        shutil.rmtree(self._profile, ignore_errors=True)


def contrast(browser: Browser) -> list:
    """Texts whose contrast to their ground is below 4.5 (WCAG 2.2, 1.4.3)."""
    return browser.value(
        """(() => {
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = parts(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; text = walker.nextNode();) {
    const node = text.parentElement, style = getComputedStyle(node);
    if (!text.data.trim() || !node.checkVisibility() || style.clipPath !== 'none') continue;
    const [a, b] = [light(parts(style.color)), light(ground(node))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push(`${text.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return low;
})()"""
    )

"""A real browser for tests: headless Chromium, spoken to over a pipe (DevTools protocol).

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATIENCE_SECONDS = 30
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
)

# Chromium reads commands from descriptor 3 and writes to 4.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    """Return where a Chromium is, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page in a browser of its own; remembers what a good page does not do."""

    def __init__(self, executable: str, profile: Path, *, width: int = 1200, height: int = 900):
        self._number, self._buffer, self._session = 0, b"", None
        self.requests: list[str] = []
        self.console: list[str] = []  # messages, exceptions and violations of the policy
        self.dialogs: list[str] = []
        read_command, self._write = os.pipe()
        self._read, write_answer = os.pipe()
        start = [sys.executable, "-c", START, str(read_command), str(write_answer), executable]
        self._process = subprocess.Popen(
            [*start, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(read_command, write_answer),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_command)
        os.close(write_answer)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._write)  # Chromium ends with its pipe
        os.close(self._read)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path | str) -> float:
        """Open a file, or a URL; return the seconds until it was loaded."""
        began = time.monotonic()
        url = path if isinstance(path, str) else path.resolve().as_uri()
        self.send("Page.navigate", url=url)
        self._loaded()
        return time.monotonic() - began

    def reload(self) -> None:
        self.send("Page.reload")
        self._loaded()

    def _loaded(self) -> None:
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """Return what a JavaScript expression is worth."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str) -> Any:
        """Return what a JavaScript expression is worth once it is something."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not (value := self.run(script)):
            assert time.monotonic() < end, script
            time.sleep(0.05)
        return value

    def violations(self) -> list[str]:
        """Return what axe-core finds against WCAG, as rule and element."""
        import axe_core_python

        rules = Path(axe_core_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
        self.run(rules + ";null")
        self.run("axe.run().then(found => { window.axeFound = found.violations })")
        self.wait("window.axeFound !== undefined")
        found = self.run(
            "window.axeFound.flatMap(v => v.nodes.map(n => `${v.id}: ${n.target.join(' ')}`))"
        )
        return list(found)

    def click(self, script: str) -> None:
        """Click where an element is, as a mouse does."""
        x, y = self.run(
            f"(() => {{ const e = {script};"
            " e.scrollIntoView({block: 'center', inline: 'center'});"
            " const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key."""
        text = {"Enter": "\r", " ": " "}.get(key)
        more = {"text": text} if text else {}
        code = {"Enter": 13, "Tab": 9, " ": 32}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                **(more if kind == "keyDown" else {}),
            )

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def resize(self, width: int, height: int = 900, *, scale: float = 1) -> None:
        """Give the page a size, in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def prefer(self, scheme: str, media: str = "") -> None:
        """Prefer a colour scheme, and show the page on a medium such as print."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what is to be seen as PNG."""
        shot = self.send(
            "Page.captureScreenshot",
            captureBeyondViewport=whole,
            **({"clip": self._all()} if whole else {}),
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def _all(self) -> dict[str, float]:
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    def _receive(self) -> dict[str, Any]:
        """Return the next message, and note what a good page does not do."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], PATIENCE_SECONDS)
            more = os.read(self._read, 1 << 16) if ready else b""
            assert more, "Chromium does not answer"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        about = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Runtime.consoleAPICalled":
                self.console.append(json.dumps(about["args"]))
            case "Runtime.exceptionThrown":
                self.console.append(json.dumps(about["exceptionDetails"]))
            case "Log.entryAdded":
                self.console.append(about["entry"]["text"])
            case "Page.javascriptDialogOpening":
                self.dialogs.append(about["message"])
        return message

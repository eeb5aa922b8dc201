"""Headless Chromium that is driven as a user would: pages are opened, typed into and clicked.

with driven(tmp_path) as browser:
    browser.open("http://127.0.0.1:8000/")
    browser.click("#prompt")
    browser.type("some text")
    browser.wait("document.querySelector('#on .state').textContent.startsWith('finished')")

The browser's debugging protocol is spoken over two pipes, which needs no library.
"""

import fcntl
import json
import os
import select
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import CHROMIUM, FLAGS, PHONE

SECONDS = 240


class Driven:
    """One page. `requested` are the addresses that it asked for, `complaints` what it wrote to the console."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._rest, self._number = commands, answers, b"", 0
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], SECONDS)
            piece = os.read(self._answers, 1 << 16) if ready else b""
            assert piece, "the browser says nothing"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: Any) -> None:
        about = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requested.append(about["request"]["url"])
        elif event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(about))

    def open(self, address: str, width: int = PHONE, *, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        self.wait(f"location.href === {json.dumps(address)} && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, as JSON."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.value(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.2)

    def click(self, selector: str) -> None:
        """The middle of the first element that the selector finds."""
        found = f"document.querySelector({json.dumps(selector)})"
        x, y = self.value(
            f"(() => {{ {found}.scrollIntoView({{block: 'center'}}); const r = {found}.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, times: int = 1, code: int = 0) -> None:
        for kind in ("keyDown", "keyUp") * times:
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


@contextmanager
def driven(scratch: Path) -> Iterator[Driven]:
    """A browser with one empty page; it is gone after the block."""
    assert CHROMIUM is not None
    (its_input, commands), (answers, its_output) = os.pipe(), os.pipe()
    # The browser reads from 3 and writes to 4; the shell moves its ends there, from numbers that are neither.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (its_input, its_output)]
    program = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={scratch / 'profile'}", "--remote-debugging-pipe"]
    browser = subprocess.Popen(
        ["bash", "-c", f"exec {shlex.join(program)} 3<&{ends[0]} 4>&{ends[1]}"],
        pass_fds=ends,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(scratch)},
    )
    for end in (its_input, its_output, *ends):
        os.close(end)
    try:
        yield Driven(commands, answers)
    finally:
        browser.terminate()
        browser.wait(60)
        os.close(commands)
        os.close(answers)

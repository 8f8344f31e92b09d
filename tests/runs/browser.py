"""A page opened in a headless browser, and what is wrong with it: script errors, requests, pictures that are not there.

The browser is a Chromium, spoken to over its DevTools pipe: the standard library is enough, and one process serves all
pages of a test session.
"""

from __future__ import annotations

import atexit
import base64
import fcntl
import functools
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "HOOKED_VLM_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
TIMEOUT = 60.0
"""Seconds that the browser has for one answer."""
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # without which it does not start for root, nor in most containers; the pages are ours
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-extensions",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no page reaches out
)


def find_browser() -> str | None:
    """The executable of a Chromium: that of the environment variable, or one on the path."""
    if chosen := os.environ.get(VARIABLE):
        return chosen
    return next((found for name in NAMES if (found := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(
    find_browser() is None,
    reason=f"no browser: install Chromium (apt install chromium), or name one's executable in {VARIABLE}",
)


@dataclass(frozen=True)
class Page:
    """What a browser found of a page."""

    title: str
    text: str
    """As it is shown."""
    n_images: int
    errors: list[str]
    """Of scripts, and of the console."""
    requests: list[str]
    """Addresses asked for beside the page itself and ``data:``, which a page that is whole does not need."""
    broken_images: list[str]
    overflowing: list[str]
    """Widths at which the page, all its details open, is wider than the window."""

    @property
    def problems(self) -> list[str]:
        """All of them, in words; a page that is right has none."""
        found = {
            "error": self.errors,
            "request": self.requests,
            "no picture": self.broken_images,
            "wider than the window": self.overflowing,
        }
        return [f"{kind}: {one}" for kind, ones in found.items() for one in ones]


def open_page(
    path: Path, *, widths: tuple[int, ...] = (1000, 700), screenshot: Path | None = None, print_to: Path | None = None
) -> Page:
    """Open a file as a page.

    Args:
        widths: of windows that it must fit into; a screenshot is of the first, in its whole length.
        screenshot: a ``.png`` to write.
        print_to: a ``.pdf`` to write, as printed on A4.
    """
    return _the_browser().open(path.resolve().as_uri(), widths, screenshot, print_to)


@functools.cache
def _the_browser() -> _Browser:
    executable = find_browser()
    assert executable, "mark the test with needs_browser"
    browser = _Browser(executable)
    atexit.register(browser.close)
    return browser


class _Browser:
    """A running browser."""

    def __init__(self, executable: str) -> None:
        self._numbers = itertools.count(1)
        self._unread = b""
        self._profile = tempfile.mkdtemp(prefix="browser-")
        # It reads commands from descriptor 3 and writes answers to 4. Ours lie higher, so that neither overwrites one.
        commands, self._write = map(_moved_up, os.pipe())
        self._read, answers = map(_moved_up, os.pipe())
        nowhere = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_RDWR, 0) for descriptor in (0, 1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, commands, 3), (os.POSIX_SPAWN_DUP2, answers, 4)]
        self._process = os.posix_spawnp(
            executable,
            [executable, *FLAGS, f"--user-data-dir={self._profile}"],
            os.environ,
            file_actions=[*nowhere, *pipes],
            setpgroup=0,
        )
        os.close(commands)
        os.close(answers)

    def open(self, address: str, widths: tuple[int, ...], screenshot: Path | None, print_to: Path | None) -> Page:
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        tab = _Tab(self, self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        try:
            for domain in ("Page", "Runtime", "Log", "Network"):
                tab.ask(f"{domain}.enable")
            return tab.look_at(address, widths, screenshot, print_to)
        finally:
            self._ask("Target.closeTarget", targetId=target)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self.send(method, parameters)
        return next(answer for answer in self.messages() if answer.get("id") == number)["result"]

    def send(self, method: str, parameters: dict[str, Any], session: str | None = None) -> int:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._write, rest) :]
        return number

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the browser says, as it says it."""
        while True:
            while b"\0" not in self._unread:
                readable, _, _ = select.select([self._read], [], [], TIMEOUT)
                more = os.read(self._read, 1 << 20) if readable else b""
                if not more:
                    raise RuntimeError("the browser ended" if readable else f"no answer of the browser in {TIMEOUT} s")
                self._unread += more
            message, _, self._unread = self._unread.partition(b"\0")
            yield json.loads(message)

    def close(self) -> None:
        """End it, and whatever it started."""
        try:
            self.send("Browser.close", {})
            for _ in range(100):
                if os.waitpid(self._process, os.WNOHANG)[0]:
                    break
                time.sleep(0.02)
            else:
                os.killpg(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)
        except (OSError, RuntimeError):
            pass  # it has ended by itself
        shutil.rmtree(self._profile, ignore_errors=True)


def _moved_up(descriptor: int) -> int:
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


class _Tab:
    """One page of a browser, and what has happened on it."""

    def __init__(self, browser: _Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self._happened: list[tuple[str, dict[str, Any]]] = []

    def look_at(self, address: str, widths: tuple[int, ...], screenshot: Path | None, print_to: Path | None) -> Page:
        self.set_width(widths[0])
        failure = self.ask("Page.navigate", url=address).get("errorText")
        assert not failure, f"{address}: {failure}"
        self._wait_for("Page.loadEventFired")
        images = self.run("[...document.images].map(one => [one.currentSrc || one.src, one.naturalWidth])")
        facts: dict[str, Any] = {
            "title": self.run("document.title"),
            "text": self.run("document.body.innerText"),
            "n_images": len(images),
            "broken_images": [source[:200] for source, width in images if not width],
        }
        if screenshot:
            self._write_screenshot(screenshot, widths[0])
        if print_to:
            self._write_pdf(print_to)
        overflowing = []
        self.run("document.querySelectorAll('details').forEach(one => one.open = true)")
        for width in widths:
            self.set_width(width)
            wide = self.run("document.documentElement.scrollWidth")
            overflowing += [f"{wide} px in {width} px"] if wide > width else []
        return Page(**facts, overflowing=overflowing, errors=self._errors(), requests=self._requests(address))

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._browser.send(method, parameters, self._session)
        for message in self._browser.messages():
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message)
        raise AssertionError

    def run(self, script: str) -> Any:
        """The value of a script, once the page has been drawn: what it set off has happened then."""
        drawn = f"new Promise(done => requestAnimationFrame(() => setTimeout(() => done({script}))))"
        return self.ask("Runtime.evaluate", expression=drawn, awaitPromise=True, returnByValue=True)["result"].get(
            "value"
        )

    def set_width(self, width: int) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def _wait_for(self, event: str) -> None:
        if all(name != event for name, _ in self._happened):
            for message in self._browser.messages():
                self._note(message)
                if message.get("method") == event:
                    return

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("sessionId") == self._session and "method" in message:
            self._happened.append((message["method"], message["params"]))

    def _errors(self) -> list[str]:
        found = []
        for name, what in self._happened:
            if name == "Runtime.exceptionThrown":
                details = what["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif name == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"):
                found.append(" ".join(str(one.get("value", one.get("description"))) for one in what["args"]))
            elif name == "Log.entryAdded" and what["entry"]["level"] == "error":
                found.append(f"{what['entry']['text']} {what['entry'].get('url', '')}".strip())
        return found

    def _requests(self, address: str) -> list[str]:
        asked = [what["request"]["url"] for name, what in self._happened if name == "Network.requestWillBeSent"]
        return [url for url in asked if url != address and not url.startswith("data:")]

    def _write_screenshot(self, path: Path, width: int) -> None:
        height = self.run("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _write_pdf(self, path: Path) -> None:
        printed = self.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(printed["data"]))

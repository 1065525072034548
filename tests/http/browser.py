"""Headless Chromium behind a proxy, driven over the DevTools protocol.

A browser is a dozen processes, and a test that is stopped by its time-out may run no more of its own code, ``finally``
of a coroutine included. So a fixture ends them, and the kernel does where pytest itself is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from .peers import command, text

__all__ = ["Browser", "StartBrowser", "start_browser"]

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-breakpad",  # its handlers leave the process group
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--proxy-bypass-list=<-loopback>",
)


class Browser:
    """A running browser with one page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method and return its result; events that come meanwhile are kept."""
        message: dict[str, Any] = {"id": next(self._ids), "method": method, "params": parameters}
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        await self._socket.send_json(message)
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self.events.append(answer)

    async def open(self, url: str) -> None:
        """Open ``url`` in the page."""
        if self._session is None:
            target = await self.call("Target.createTarget", url="about:blank")
            attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            self._session = attached["sessionId"]
        answer = await self.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer

    async def event(self, method: str, **wanted: Any) -> dict[str, Any]:
        """Wait for an event with these parameters and return all of them."""
        seen = 0
        while True:
            for event in self.events[seen:]:
                parameters = event.get("params", {})
                if event.get("method") == method and all(parameters.get(key) == wanted[key] for key in wanted):
                    return dict(parameters)
            seen = len(self.events)
            self.events.append(await self._socket.receive_json())


StartBrowser = Callable[..., contextlib.AbstractAsyncContextManager[Browser]]


@pytest.fixture
def start_browser() -> Iterator[StartBrowser]:
    """Start browsers, each a context manager. None outlives the test, however that ends."""
    started: list[subprocess.Popen[bytes]] = []

    @contextlib.asynccontextmanager
    async def start(directory: Path, proxy: str, ca: Path | None) -> AsyncIterator[Browser]:
        """Run Chromium with a profile of its own in ``directory``, behind ``proxy``, trusting ``ca``."""
        process = _start(directory, proxy, await _home(directory, ca))
        started.append(process)
        port, path = await _endpoint(process, directory / "profile/DevToolsActivePort", directory / "chromium.log")
        async with aiohttp.ClientSession() as session:
            url = f"ws://127.0.0.1:{port}{path}"
            async with session.ws_connect(url, max_msg_size=2**26) as socket:
                running = Browser(socket)
                yield running
                with contextlib.suppress(TypeError, ConnectionError):
                    await running.call("Browser.close")  # the answer may be that the socket closes
        await asyncio.to_thread(process.wait, 20)

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):  # the whole group has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start(directory: Path, proxy: str, home: Path) -> subprocess.Popen[bytes]:
    options = (f"--proxy-server={proxy}", f"--user-data-dir={directory / 'profile'}", "about:blank")
    with (directory / "chromium.log").open("wb") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "chromium", *_FLAGS, *options],
            env={**os.environ, "HOME": str(home)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


async def _home(directory: Path, ca: Path | None) -> Path:
    home = directory / "home"
    database = home / ".pki" / "nssdb"
    database.mkdir(parents=True)
    if ca is not None:
        await command("certutil", "-d", f"sql:{database}", "-N", "--empty-password")
        await command("certutil", "-d", f"sql:{database}", "-A", "-t", "C,,", "-n", "tests", "-i", ca)
    return home


async def _endpoint(process: subprocess.Popen[bytes], file: Path, log: Path) -> tuple[int, str]:
    while len(found := text(file).split()) < 2:
        if process.poll() is not None:
            raise RuntimeError(f"chromium ended with {process.returncode}: {text(log)}")
        await asyncio.sleep(0.05)
    return int(found[0]), found[1]

"""A supervisor in a process of its own, with real workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..lab import temporary_directory


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, line: str) -> Any:
        """Send a line and return the JSON that comes back."""
        self.writer.write(line.encode() + b"\n")
        answer = await asyncio.wait_for(self.reader.readline(), 60)
        if not answer:
            raise ConnectionResetError("the server closed")
        return json.loads(answer)

    async def ended(self) -> str:
        """Wait until the server ends the connection; say how."""
        try:
            while await asyncio.wait_for(self.reader.read(65536), 60):
                pass
        except ConnectionResetError:
            return "reset"
        return "eof"

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@dataclass
class Supervised:
    """A running supervisor process."""

    process: asyncio.subprocess.Process
    temporary: Path
    ports: list[int] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    failure: str = ""
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _clients: list[Client] = field(default_factory=list)

    async def open(self, listener: int = 0) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.ports[listener]))
        self._clients.append(client)
        return client

    async def open_to(self, worker: int) -> Client:
        """Open connections until one is served by ``worker``."""
        while True:
            client = await self.open()
            if (await client.ask("who"))["worker"] == worker:
                return client
            await client.close()

    async def pids(self) -> dict[int, int]:
        client = await self.open()
        answer = await client.ask("ask sum")
        await client.close()
        return {int(worker): pid for worker, pid in answer["pids"].items()}

    async def logged(self, text: str) -> str:
        """Wait for a log line that contains ``text``."""
        async with self._news:
            await asyncio.wait_for(self._news.wait_for(lambda: any(text in line for line in self.log)), 60)
        return next(line for line in self.log if text in line)

    def metrics_files(self) -> list[Path]:
        """The files in which the workers count."""
        return sorted(self.temporary.glob("rama-ebpf-metrics-*/*"))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def wait(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 60)

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._news:
                self.log.append(line.decode().rstrip())
                self._news.notify_all()

    async def stop(self) -> None:
        for client in self._clients:
            await client.close()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


Start = Callable[..., Awaitable[Supervised]]


@pytest.fixture
async def supervise() -> AsyncIterator[Start]:
    """Start a supervisor: ``await supervise("talk", workers=2, …)`` with the fields of a Plan."""
    async with contextlib.AsyncExitStack() as cleanup:
        # Not tmp_path: unprivileged workers must be able to reach it.
        parent = cleanup.enter_context(temporary_directory())

        async def start(application: str = "talk", **options: Any) -> Supervised:
            options["target"] = f"tests.process.applications:{application}"
            process = await asyncio.create_subprocess_exec(
                *(
                    sys.executable,
                    "-m",
                    "tests.process.supervise",
                    json.dumps({"workers": 2, "parent": str(parent), **options}),
                ),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            running = Supervised(process, parent)
            reading = asyncio.create_task(running.read_log())
            cleanup.push_async_callback(asyncio.wait, [reading])
            cleanup.push_async_callback(running.stop)
            assert process.stdout is not None
            word, _, rest = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().partition(" ")
            if word == "ready":
                running.ports = json.loads(rest)
            else:
                running.failure = rest
            return running

        yield start


def state(pid: int) -> str:
    """The state letter of a process, "X" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def status(pid: int) -> dict[str, list[str]]:
    """What /proc/PID/status says."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


async def gone(pid: int) -> None:
    """Wait until the process ``pid`` is no more, or only a zombie."""
    for _ in range(600):
        if state(pid) in "XZ":
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"process {pid} is still there after 30 s")

"""A real TCP server on loopback around the stack under test, and plain asyncio clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from rama_ebpf.core import Service, Stream
from rama_ebpf.services.tcp import TcpServer, bind_tcp


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, data: bytes) -> bytes:
        """Send ``data`` and return as many bytes."""
        self.writer.write(data)
        return await self.reader.readexactly(len(data))

    async def ended(self) -> str:
        """Wait until the server ends the connection; say how: "eof" or "reset"."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionResetError:
            return "reset"
        return "eof"


@dataclass
class Running:
    """A server under test. ``outcomes`` holds what each connection's stack returned or raised, in order of ending."""

    server: TcpServer
    port: int
    outcomes: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    streams: list[Stream] = field(default_factory=list)
    _arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    _clients: list[Client] = field(default_factory=list)

    async def open(self, source: str = "127.0.0.1") -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        client = Client(reader, writer)
        self._clients.append(client)
        return client

    async def arrive(self, stream: Stream) -> None:
        async with self._arrived:
            self.streams.append(stream)
            self._arrived.notify_all()

    async def accepted(self, count: int) -> None:
        """Wait until ``count`` connections have reached the stack."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.streams) >= count)

    async def outcome(self) -> Any:
        return await asyncio.wait_for(self.outcomes.get(), 30)

    async def stop(self) -> None:
        for client in self._clients:
            client.writer.close()
            with contextlib.suppress(ConnectionError):  # what the server did to it is the test's own matter
                await client.writer.wait_closed()
        await self.server.drain(0)
        self.server.listener.close()


Serve = Callable[[Service[Stream, Any]], Awaitable[Running]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with contextlib.AsyncExitStack() as cleanup:

        async def start(service: Service[Stream, Any]) -> Running:
            async def observed(stream: Stream) -> None:
                await running.arrive(stream)
                try:
                    outcome = await service(stream)
                except BaseException as error:
                    running.outcomes.put_nowait(error)
                    raise
                running.outcomes.put_nowait(outcome)

            listener = bind_tcp("127.0.0.1", 0)
            running = Running(TcpServer(listener, observed), listener.getsockname()[1])
            running.server.start()
            cleanup.push_async_callback(running.stop)
            return running

        yield start


async def echo(stream: Stream) -> str:
    """Send back what comes until EOF."""
    while data := await stream.read():
        await stream.write(data)
    return "served"


@pytest.fixture
async def echo_target() -> AsyncIterator[int]:
    """The port of an echo server that stands for a tunnel's upstream."""
    listener = bind_tcp("127.0.0.1", 0)
    server = TcpServer(listener, echo)
    server.start()
    yield listener.getsockname()[1]
    await server.drain(0)
    listener.close()

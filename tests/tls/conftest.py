"""Real servers on loopback: ours around any service, and TLS targets of Python's own ssl behind it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from rama_ebpf.core import IPAddress, RamaError, Service, Stream
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector, ResolveError
from rama_ebpf.services.tcp import TcpServer, bind_tcp

from .pki import Authority

HOST = "127.0.0.1"


class Loopback:
    """Resolves every name under ``.test`` to loopback, and no other."""

    async def resolve(self, name: str) -> Sequence[IPAddress]:
        if not name.endswith(".test"):
            raise ResolveError(f"{name!r} does not exist")
        return [ip_address(HOST)]


@dataclass
class Running:
    """A running server: its port, and how its connections ended."""

    port: int
    server: TcpServer
    errors: list[BaseException] = field(default_factory=list)
    results: list[object] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def idle(self, at_least: int = 0) -> None:
        """Wait until every accepted connection, and at least so many, have been served to their end."""
        while len(self.errors) + len(self.results) < max(self.server.accepted, at_least):
            self.ended.clear()
            await self.ended.wait()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(HOST, self.port)


Serve = Callable[[Service[Stream, object]], Running]
TlsTarget = Callable[..., Awaitable[int]]


@pytest.fixture
def connector() -> Connector:
    return Connector(Loopback(), EgressPolicy.of([f"{HOST}/32"]), timeout=5.0)


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serve a service on a TCP port: ``running = serve(stack(...))``."""
    async with contextlib.AsyncExitStack() as cleanup:

        def start(service: Service[Stream, object]) -> Running:
            listener = bind_tcp(HOST, 0)

            async def observed(stream: Stream) -> None:
                try:
                    running.results.append(await service(stream))
                except (RamaError, OSError) as error:
                    running.errors.append(error)
                    raise
                finally:
                    running.ended.set()

            server = TcpServer(listener, observed)
            running = Running(listener.getsockname()[1], server)
            server.start()

            async def stop() -> None:
                await server.drain(0)
                listener.close()

            cleanup.push_async_callback(stop)
            return running

        yield start


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def trust(authority: Authority) -> ssl.SSLContext:
    """A client's context that trusts the tests' authority."""
    return ssl.create_default_context(cafile=str(authority.certificate))


@pytest.fixture
async def tls_target(authority: Authority) -> AsyncIterator[TlsTarget]:
    """Start a TLS server of asyncio's: ``port = await tls_target("a.test")``; it says its name, then echoes."""
    async with contextlib.AsyncExitStack() as cleanup:

        async def start(name: str, *, alpn: Sequence[str] = ()) -> int:
            leaf = authority.issue(name)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(leaf.chain, leaf.key)
            if alpn:
                context.set_alpn_protocols(list(alpn))

            async def greet_and_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    writer.write(f"{name}\n".encode())
                    while data := await reader.read(65536):
                        writer.write(data)
                        await writer.drain()
                writer.close()

            server = await asyncio.start_server(greet_and_echo, HOST, 0, ssl=context)
            cleanup.callback(server.close)
            return int(server.sockets[0].getsockname()[1])

        yield start


@pytest.fixture
def run() -> Callable[..., Awaitable[tuple[int, str, str]]]:
    """Run a real client: ``code, out, err = await run("curl", …, stdin="…")``."""

    async def command(*argv: str | Path, stdin: str = "") -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *map(str, argv),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 60)
        except BaseException:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")

    return command

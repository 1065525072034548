"""The contestants of the TLS benchmarks: each terminates TLS on one CPU and relays to a plaintext backend, or, where
the backend's port is 0, waits for the client to close.

``ours`` (uvloop), ``asyncio`` and ``uvloop`` (streams of the standard library on either loop) and ``haproxy`` (one
thread), with the same certificate, TLS versions and ciphers. Used by :mod:`bench.tls_handshakes` and
:mod:`bench.tls_bulk`; ``python -m bench.tls_servers NAME PORT BACKEND-PORT CHAIN KEY`` serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from rama_ebpf.core import Authority, Stream, stack
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.relay import relay
from rama_ebpf.services.connect import Connector, SystemResolver
from rama_ebpf.services.tcp import TcpServer, bind_tcp
from rama_ebpf.services.tls import CertificateStore, KeyPair, ServerTls, TlsTerminateLayer

__all__ = ["NAMES", "Contestant", "free_port", "serving", "spread", "wait_for_port"]

NAMES = ("ours", "uvloop", "asyncio", "haproxy")
_CHUNK = 256 * 1024

_HAPROXY = """
global
    nbthread 1
    ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
    mode {mode}
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend tls
    bind 127.0.0.1:{port} ssl crt {bundle}
    {then}
backend plain
    server one 127.0.0.1:{backend}
"""


@dataclass
class Contestant:
    """A server that runs: its port, and the CPU time of its process."""

    port: int
    pid: int

    def cpu(self) -> float:
        """CPU seconds that the process has used, in user and kernel."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def serving(name: str, backend: int, chain: Path, key: Path) -> Iterator[Contestant]:
    """Start a contestant and wait until it accepts."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        if name == "haproxy":
            bundle, config = Path(directory, "bundle.pem"), Path(directory, "haproxy.cfg")
            bundle.write_bytes(chain.read_bytes() + key.read_bytes())
            mode, then = ("tcp", "default_backend plain") if backend else ("http", "http-request return status 204")
            config.write_text(_HAPROXY.format(port=port, bundle=bundle, backend=backend or 1, mode=mode, then=then))
            argv = ["haproxy", "-db", "-q", "-f", str(config)]
        else:
            argv = [sys.executable, "-m", "bench.tls_servers", name, str(port), str(backend), str(chain), str(key)]
        with subprocess.Popen(argv) as process:
            try:
                wait_for_port(port)
                yield Contestant(port, process.pid)
            finally:
                process.kill()


def wait_for_port(port: int) -> None:
    """Wait until something accepts there, for at most 10 s."""
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"nothing accepts on port {port}")


def spread(rounds: Sequence[float], decimals: int = 0) -> str:
    """The median, and the least and the most of all rounds."""
    least, middle, most = (f"{value:.{decimals}f}" for value in (min(rounds), statistics.median(rounds), max(rounds)))
    return f"{middle} ({least}-{most})"


async def _ours(port: int, backend: int, chain: Path, key: Path) -> None:
    connector = Connector(SystemResolver(), EgressPolicy.of(["127.0.0.1/32"]))
    target = Authority.of("127.0.0.1", backend)

    async def forward(stream: Stream) -> object:
        return await relay(stream, await connector(target)) if backend else await stream.read()

    store = CertificateStore.of_files(ServerTls(), KeyPair(chain, key))
    server = TcpServer(bind_tcp("127.0.0.1", port), stack(TlsTerminateLayer(store), forward))
    server.start()
    await asyncio.get_running_loop().create_future()


async def _plain_asyncio(port: int, backend: int, chain: Path, key: Path) -> None:
    context = ServerTls().context(KeyPair(chain, key))

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError, RuntimeError):  # uvloop's word for a transport that is closed
            while data := await reader.read(_CHUNK):
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not backend:
            with contextlib.suppress(OSError):
                await reader.read()
            writer.close()
            return
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", backend, limit=_CHUNK)
        await asyncio.wait(
            [
                asyncio.create_task(pump(reader, upstream_writer)),
                asyncio.create_task(pump(upstream_reader, writer)),
            ],
            return_when=asyncio.FIRST_COMPLETED,
        )
        writer.close()
        upstream_writer.close()

    server = await asyncio.start_server(forward, "127.0.0.1", port, ssl=context, limit=_CHUNK, backlog=4096)
    await server.serve_forever()


def main() -> None:
    name, port, backend, chain, key = sys.argv[1:]
    serve = _ours if name == "ours" else _plain_asyncio
    factory = None if name == "asyncio" else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(int(port), int(backend), Path(chain), Path(key)))


if __name__ == "__main__":
    main()

"""Interception of names that were never seen before: ``python -m bench.tls_mitm [NAMES]``.

A client connects to one new name after the other through the interceptor; the server behind has a certificate for
each. Then the same names again, from the cache. Reported are connections per second, and what each costs the
interceptor in CPU; and by itself what it takes to sign a leaf, and to load it into an OpenSSL context.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import uvloop
from cryptography.hazmat.primitives.asymmetric import ec

from rama_ebpf.core import Stream, stack
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.tcp import TcpServer, bind_tcp
from rama_ebpf.services.tls import (
    CertificateAuthority,
    ClientHello,
    ClientTls,
    Leaf,
    LeafIssuer,
    TlsInterceptor,
    TlsPassthrough,
    TlsPeekLayer,
    TlsTerminateLayer,
    TlsTunnelLayer,
)
from tests.tls.conftest import Loopback

from .tls_servers import Contestant, free_port, wait_for_port


def upstream(port: int, directory: str) -> None:
    """The servers behind: one that has a certificate for whatever name it is asked for."""

    async def serve() -> None:
        issuer = LeafIssuer(_load(directory, "upstream"), cache_size=100_000)

        async def select(hello: ClientHello) -> ssl.SSLContext:
            return issuer.for_name(hello.server_name or "bench.test")

        async def hello(stream: Stream) -> None:
            await stream.write(b"hello")

        TcpServer(bind_tcp("127.0.0.1", port), stack(TlsTerminateLayer(select), hello)).start()
        await asyncio.get_running_loop().create_future()

    uvloop.run(serve())


def interceptor(port: int, behind: int, directory: str) -> None:
    async def serve() -> None:
        issuer = LeafIssuer(_load(directory, "ours"), cache_size=100_000)
        intercept = TlsInterceptor(issuer, ClientTls(ca=Path(directory, "upstream.pem")))
        connector = Connector(Loopback(), EgressPolicy.of(["127.0.0.1/32"]))
        service = stack(TlsPeekLayer(), TlsTunnelLayer(intercept=intercept), TlsPassthrough(connector, port=behind))
        TcpServer(bind_tcp("127.0.0.1", port), service).start()
        await asyncio.get_running_loop().create_future()

    uvloop.run(serve())


def _load(directory: str, name: str) -> CertificateAuthority:
    return CertificateAuthority.load(Path(directory, f"{name}.pem"), Path(directory, f"{name}.key"))


def connect(port: int, names: list[str], ca: Path) -> None:
    context = ssl.create_default_context(cafile=str(ca))
    for name in names:
        with (
            socket.create_connection(("127.0.0.1", port)) as sock,
            context.wrap_socket(sock, server_hostname=name) as tls,
        ):
            assert tls.recv(5) == b"hello"


def each(count: int, function: Callable[[], object]) -> float:
    """Return milliseconds of CPU for one call."""
    started = time.process_time()
    for _ in range(count):
        function()
    return (time.process_time() - started) / count * 1000


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    names = [f"host{number}.bench.test" for number in range(count)]
    with tempfile.TemporaryDirectory() as directory:
        for name in ("ours", "upstream"):
            CertificateAuthority.create(name).save(Path(directory, f"{name}.pem"), Path(directory, f"{name}.key"))
        authority = _load(directory, "ours")
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
        leaf = Leaf.of_name("bench.test")
        print(f"sign a leaf: {each(500, lambda: authority.issue(leaf, key)):.3f} ms of CPU")
        issuer = LeafIssuer(authority)
        fresh = iter(names)
        print(f"sign a leaf and load it: {each(200, lambda: issuer.for_name(next(fresh))):.3f} ms of CPU")
        behind, port = free_port(), free_port()
        spawn = multiprocessing.get_context("spawn")
        servers = [
            spawn.Process(target=upstream, args=(behind, directory), daemon=True),
            spawn.Process(target=interceptor, args=(port, behind, directory), daemon=True),
        ]
        for process in servers:
            process.start()
        try:
            wait_for_port(behind)
            wait_for_port(port)
            connect(behind, names, Path(directory, "upstream.pem"))  # so that its own certificates are ready
            connect(port, ["warm.bench.test"], Path(directory, "ours.pem"))
            pid = servers[1].pid
            assert pid is not None
            measured = Contestant(port, pid)
            for what in ("new names", "known names"):
                before, started = measured.cpu(), time.monotonic()
                connect(port, names, Path(directory, "ours.pem"))
                wall, cpu = time.monotonic() - started, measured.cpu() - before
                print(f"{what}: {count / wall:.0f} a second, {cpu / count * 1000:.2f} ms of CPU each")
        finally:
            for process in servers:
                process.kill()


if __name__ == "__main__":
    main()

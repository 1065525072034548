"""Passing through changes nothing: what openssl and tlslite-ng see through us equals what they see directly."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rama_ebpf.core import Authority as Target
from rama_ebpf.core import stack
from rama_ebpf.core.names import NameMap
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.tls import TlsPassthrough, TlsPeekLayer

from .conftest import HOST, Serve
from .pki import Authority

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports use what newer Pythons have deprecated
    from tlslite.api import HandshakeSettings, TLSConnection
    from tlslite.constants import KeyUpdateMessageType
    from tlslite.errors import TLSError
    from tlslite.session import Session

Run = Callable[..., Awaitable[tuple[int, str, str]]]


@dataclass
class Ports:
    """One openssl s_server, and the two ways to it."""

    direct: int
    through: int


@pytest.fixture
async def ports(serve: Serve, connector: Connector, authority: Authority) -> AsyncIterator[Ports]:
    """``openssl s_server -rev`` sends lines back reversed; it closes on the line CLOSE."""
    leaf = authority.issue("a.test", stem="transparent")
    server = await asyncio.create_subprocess_exec(
        *("openssl", "s_server", "-accept", f"{HOST}:0", "-rev", "-alpn", "h2,http/1.1", "-groups", "P-256:X25519"),
        *("-cert", leaf.chain, "-cert_chain", leaf.chain, "-key", leaf.key),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert server.stdout is not None
    line = b""
    while not line.startswith(b"ACCEPT"):
        line = await server.stdout.readline()
        assert line, "openssl s_server did not start"
    reading = asyncio.create_task(server.stdout.read())
    direct = int(line.rpartition(b":")[2])
    target = Target(Target.of(HOST, 0).host, direct)
    passthrough = TlsPassthrough(connector, targets=NameMap([("*.test", target)]), no_sni=target)
    yield Ports(direct, serve(stack(TlsPeekLayer(), passthrough)).port)
    with contextlib.suppress(ProcessLookupError):
        server.kill()
    await server.wait()
    await reading


OPENSSL = {
    "TLS 1.3": ["-tls1_3"],
    "TLS 1.2": ["-tls1_2"],
    "TLS 1.1, not spoken": ["-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"],
    "a hello retry": ["-tls1_3", "-groups", "X448:P-256"],
    "no group in common": ["-tls1_3", "-groups", "X448"],
    "ALPN": ["-alpn", "spdy/1,http/1.1"],
    "ALPN not spoken": ["-alpn", "spdy/1"],
    "no cipher in common": ["-tls1_2", "-cipher", "AES256-SHA@SECLEVEL=0"],
    "no server name": ["-noservername"],
    "another server name": ["-servername", "b.test"],
    "small fragments": ["-max_send_frag", "512", "-split_send_frag", "512"],
    "no ticket": ["-tls1_2", "-no_ticket"],
    "status request": ["-status"],
}


@pytest.mark.parametrize("arguments", OPENSSL.values(), ids=OPENSSL.keys())
async def test_openssl_sees_the_same(ports: Ports, run: Run, authority: Authority, arguments: list[str]) -> None:
    async def client(port: int) -> tuple[int, str, list[str]]:
        name = [] if {"-servername", "-noservername"} & set(arguments) else ["-servername", "a.test"]
        code, out, err = await run(
            *("openssl", "s_client", "-connect", f"{HOST}:{port}", "-CAfile", authority.certificate, "-brief"),
            *("-ign_eof", *name, *arguments),
            stdin="hello\n" + "x" * 5000 + "\nCLOSE\n",
        )
        # Addresses of the process and of errors' sources differ by nature.
        lines = [re.sub(r"^[0-9A-F]{8,16}:|:\.\./[^:]*:[0-9]+:|\.c:[0-9]+", "", line) for line in err.splitlines()]
        return code, out, lines

    direct = await client(ports.direct)
    assert "Unknown option" not in str(direct)
    assert await client(ports.through) == direct


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_openssl_resumes_through_us_what_it_began_directly(
    ports: Ports, run: Run, tmp_path: Path, version: str
) -> None:
    session = tmp_path / "session"

    async def connect(port: int, *arguments: str | Path) -> str:
        _, out, _ = await run(
            *("openssl", "s_client", "-connect", f"{HOST}:{port}", "-servername", "a.test", version, "-ign_eof"),
            *arguments,
            stdin="hello\nCLOSE\n",
        )
        found = re.search(r"^(New|Reused), ", out, re.MULTILINE)
        return found[1] if found else out

    assert await connect(ports.direct, "-sess_out", session) == "New"
    assert await connect(ports.through, "-sess_in", session) == "Reused"


def tlslite_client(port: int, version: tuple[int, int], behaviour: str) -> list[object]:
    """Behave in a certain way with tlslite-ng and return what was seen."""
    seen: list[object] = []
    settings = HandshakeSettings()
    settings.minVersion = settings.maxVersion = version

    def connect(session: Session | None = None) -> TLSConnection:
        sock = socket.create_connection((HOST, port), timeout=20)
        connection = TLSConnection(sock)
        connection.handshakeClientCert(
            settings=settings, session=session, serverName="a.test", alpn=[bytearray(b"http/1.1")]
        )
        session = connection.session
        seen.append((connection.version, session.cipherSuite, bytes(session.appProto), connection.resumed))
        return connection

    connection = None
    try:
        connection = connect()
        connection.write(b"hello\n")
        seen.append(bytes(connection.read(min=6, max=6)))
        if behaviour == "close":
            connection.close()
            seen.append(connection.closed)
        elif behaviour == "vanish":
            connection.sock.close()
        elif behaviour == "half-close":
            connection.sock.shutdown(socket.SHUT_WR)
            seen.append(bytes(connection.read()))
        elif behaviour == "garbage":
            connection.sock.send(b"\x17\x03\x03\x00\x30" + bytes(48))
            seen.append(bytes(connection.read()))
        elif behaviour == "plaintext":
            connection.sock.send(b"GET / HTTP/1.1\r\n\r\n")
            seen.append(bytes(connection.read()))
        elif behaviour == "key update":
            for _ in connection.send_keyupdate_request(KeyUpdateMessageType.update_requested):
                pass
            connection.write(b"again\n")
            seen.append(bytes(connection.read(min=6, max=6)))
        elif behaviour == "resume":
            session = connection.session
            connection.close()
            connection = connect(session)
    except (TLSError, OSError) as error:
        seen.append((type(error), str(error)))
    finally:
        if connection is not None:
            connection.sock.close()
    return seen


@pytest.mark.parametrize("version", [(3, 1), (3, 3), (3, 4)], ids=["1.0", "1.2", "1.3"])
@pytest.mark.parametrize("behaviour", ["close", "vanish", "half-close", "garbage", "plaintext", "key update", "resume"])
async def test_tlslite_sees_the_same(ports: Ports, version: tuple[int, int], behaviour: str) -> None:
    if behaviour == "key update" and version != (3, 4):
        behaviour = "close"  # there are none before TLS 1.3
    direct = await asyncio.to_thread(tlslite_client, ports.direct, version, behaviour)
    assert direct
    assert await asyncio.to_thread(tlslite_client, ports.through, version, behaviour) == direct

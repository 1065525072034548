"""SOCKS by hand: the bytes that a client sends and the answers it reads, written apart from the code under test."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address

from rama_ebpf.core import AuthFailed, Credentials, User

from .conftest import Proxy

GREETING = b"\x05\x01\x00"
CONNECT, BIND, UDP_ASSOCIATE = 1, 2, 3


def address(host: str, port: int) -> bytes:
    """ATYP, address and port."""
    try:
        ip = ip_address(host)
    except ValueError:
        return domain(host.encode(), port)
    return bytes((1 if ip.version == 4 else 4,)) + ip.packed + port.to_bytes(2, "big")


def domain(name: bytes, port: int) -> bytes:
    return bytes((3, len(name))) + name + port.to_bytes(2, "big")


def request(host: str, port: int, command: int = CONNECT) -> bytes:
    return bytes((5, command, 0)) + address(host, port)


def failed(rep: int) -> bytes:
    """The selection of method 0 and a reply that refuses."""
    return b"\x05\x00" + bytes((5, rep, 0, 1)) + bytes(6)


async def exchange(proxy: Proxy, data: bytes, *, eof: bool = False) -> bytes:
    """Send ``data`` in one segment and return everything the proxy answers until it closes."""
    reader, writer = await proxy.open()
    try:
        writer.write(data)
        if eof:
            writer.write_eof()
        return await reader.read()
    finally:
        writer.close()


async def read_reply(reader: asyncio.StreamReader) -> tuple[int, tuple[str, int]]:
    """Read a SOCKS5 reply: REP, and BND.ADDR with BND.PORT."""
    head = await reader.readexactly(4)
    assert head[0] == 5
    assert head[2] == 0
    ip = ip_address(await reader.readexactly({1: 4, 4: 16}[head[3]]))
    return head[1], (str(ip), int.from_bytes(await reader.readexactly(2), "big"))


async def start(
    proxy: Proxy, host: str, port: int, command: int = CONNECT
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, tuple[str, int]]:
    """Shake hands and have one request granted; return the streams and what BND says."""
    reader, writer = await proxy.open()
    writer.write(GREETING + request(host, port, command))
    assert await reader.readexactly(2) == b"\x05\x00"
    rep, bound = await read_reply(reader)
    assert rep == 0
    return reader, writer, bound


def closed_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


async def only_tom(credentials: Credentials) -> User:
    """An authenticator that knows one user, tom with the password secret."""
    if credentials != Credentials("tom", "secret"):
        raise AuthFailed(f"wrong user name or password for {credentials.username!r}")
    return User("tom")


class Udp:
    """A UDP socket of a test."""

    def __init__(self, host: str, port: int = 0) -> None:
        self._sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        try:
            self._sock.bind((host, port))
        except OSError:
            self._sock.close()
            raise
        self.address: tuple[str, int] = self._sock.getsockname()[:2]

    def send(self, data: bytes, to: tuple[str, int]) -> None:
        self._sock.sendto(data, to)

    async def receive(self) -> tuple[bytes, tuple[str, int]]:
        loop = asyncio.get_running_loop()  # uvloop has no sock_recvfrom()
        ready = asyncio.Event()
        loop.add_reader(self._sock, ready.set)
        try:
            async with asyncio.timeout(20):
                await ready.wait()
        finally:
            loop.remove_reader(self._sock)
        data, source = self._sock.recvfrom(65535)
        return data, source[:2]

    def nothing(self) -> bool:
        """Whether nothing has arrived."""
        try:
            self._sock.recv(65535)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self._sock.close()

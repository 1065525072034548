"""One question to one name server: UDP, then TCP for an answer that does not fit (RFC 1035, RFC 7766, RFC 6891).

Each question has a socket of its own, connected, so that the kernel chooses its source port, takes datagrams from that
server only, and reports a closed port at once; the message id is random (RFC 5452). What does not answer the question
is not looked at: a forger who guesses wrong costs nothing but the time to parse.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Final

from ...core.address import IPAddress, SocketAddress
from .message import (
    FORMERR,
    NOERROR,
    NOTIMP,
    NXDOMAIN,
    ContradictoryAnswer,
    Family,
    MalformedMessage,
    Query,
    Reply,
    code_name,
)

__all__ = ["Answer", "BadAnswer", "Family", "ask"]

_DNS_PORT: Final = 53
_UDP_PAYLOAD: Final = 1232  # octets that no link fragments (DNS flag day 2020)
_MAX_ANSWER: Final = 16 * 1024  # octets over TCP
_MAX_TTL: Final = 3600
_MAX_NEGATIVE_TTL: Final = 60
_MAX_FORGED: Final = 100  # datagrams that answer another question, before the server is given up


class BadAnswer(Exception):
    """A server's answer is of no use: it failed, refuses, or what it says cannot be read."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Addresses of one family (at most 64; none: the name has none), good for ``ttl`` seconds."""

    addresses: tuple[IPAddress, ...]
    ttl: float
    exists: bool = True


async def ask(server: IPAddress, name: str, family: Family) -> Answer:
    """Ask ``server`` for the addresses of ``name`` (ASCII, absolute, without the dot at its end).

    Waits for ever; bound it from outside. Raises :class:`BadAnswer` or OSError.
    """
    try:
        reply = await _exchange(server, Query.make(name, family, _UDP_PAYLOAD))
        if reply.code in (FORMERR, NOTIMP):  # RFC 6891 section 7: a server from before EDNS
            reply = await _exchange(server, Query.make(name, family, None))
    except MalformedMessage as error:
        raise BadAnswer(f"{server} says what cannot be read: {error}") from error
    if reply.code not in (NOERROR, NXDOMAIN):
        raise BadAnswer(code_name(reply.code))
    if reply.addresses:
        return Answer(reply.addresses, min(reply.ttl, _MAX_TTL))
    return Answer((), min(reply.ttl, _MAX_NEGATIVE_TTL), exists=reply.code == NOERROR)


async def _exchange(server: IPAddress, query: Query) -> Reply:
    loop = asyncio.get_running_loop()
    address = SocketAddress.zoned(server, _DNS_PORT)
    wire = query.pack()
    with socket.socket(address.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address.to_sockaddr())
        sock.send(wire)
        for _ in range(_MAX_FORGED):
            reply = _told(query, await loop.sock_recv(sock, _MAX_ANSWER))
            if reply is not None:
                break
        else:
            raise BadAnswer(f"{server} sends only what was not asked")
    if not reply.truncated:
        return reply
    with socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        await loop.sock_connect(sock, address.to_sockaddr())
        await loop.sock_sendall(sock, len(wire).to_bytes(2, "big") + wire)
        length = int.from_bytes(await _receive(sock, 2), "big")
        if length > _MAX_ANSWER:
            raise BadAnswer(f"{server} answers with {length} octets")
        over_tcp = query.read(await _receive(sock, length))
    if over_tcp is None or over_tcp.truncated:
        raise BadAnswer(f"{server} answers another question over TCP, or no whole one")
    return over_tcp


def _told(query: Query, data: bytes) -> Reply | None:
    """Read a datagram: one that cannot be read may be a forger's, as one that answers another question."""
    try:
        return query.read(data)
    except ContradictoryAnswer:
        raise
    except MalformedMessage:
        return None


async def _receive(sock: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        more = await loop.sock_recv(sock, count - len(data))
        if not more:
            raise BadAnswer("the connection ended in the middle of an answer")
        data += more
    return data

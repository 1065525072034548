"""One question to one name server: UDP, then TCP for an answer that does not fit (RFC 1035, RFC 7766, RFC 6891).

Each question has a socket of its own, connected, so that the kernel chooses its source port, takes datagrams from that
server only, and reports a closed port at once; the message id is random (RFC 5452). What does not answer the question
is not looked at: a forger who guesses wrong costs nothing but the time to parse.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype

from ...core.address import IPAddress, SocketAddress

__all__ = ["Answer", "BadAnswer", "Family", "ask", "load_types"]

Family = type[IPv4Address] | type[IPv6Address]

_DNS_PORT: Final = 53
_UDP_PAYLOAD: Final = 1232  # octets that no link fragments (DNS flag day 2020)
_MAX_ANSWER: Final = 16 * 1024  # octets over TCP; parsing 64 KiB would hold the event loop for 90 ms
_MAX_ADDRESSES: Final = 64
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


def load_types() -> None:
    """Import what parsing answers needs, while files can be read: a sandboxed worker cannot later."""
    for name in ("IN.A", "IN.AAAA", "ANY.CNAME", "ANY.DNAME", "ANY.SOA", "ANY.OPT", "ANY.RRSIG", "ANY.NS"):
        importlib.import_module(f"dns.rdtypes.{name}")


async def ask(server: IPAddress, name: str, family: Family) -> Answer:
    """Ask ``server`` for the addresses of ``name`` (ASCII, absolute, without the dot at its end).

    Waits for ever; bound it from outside. Raises :class:`BadAnswer` or OSError.
    """
    query = _query(name, family)
    try:
        response = await _exchange(server, query)
        if response.rcode() in (dns.rcode.FORMERR, dns.rcode.NOTIMP):
            query.use_edns(False)  # RFC 6891 section 7: a server from before EDNS
            response = await _exchange(server, query)
        return _answer(response)
    except (dns.exception.DNSException, ValueError) as error:
        raise BadAnswer(f"{server} says what cannot be read: {type(error).__name__}") from error


def _query(name: str, family: Family) -> dns.message.QueryMessage:
    labels = [label.encode("ascii") for label in name.split(".")]
    kind = dns.rdatatype.A if family is IPv4Address else dns.rdatatype.AAAA
    return dns.message.make_query(dns.name.Name([*labels, b""]), kind, use_edns=0, payload=_UDP_PAYLOAD)


async def _exchange(server: IPAddress, query: dns.message.QueryMessage) -> dns.message.Message:
    loop = asyncio.get_running_loop()
    address = SocketAddress.zoned(server, _DNS_PORT)
    wire = query.to_wire()
    with socket.socket(address.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address.to_sockaddr())
        sock.send(wire)
        for _ in range(_MAX_FORGED):
            data = await loop.sock_recv(sock, _MAX_ANSWER)
            response = _read(data, query)
            if response is not None:
                break
        else:
            raise BadAnswer(f"{server} sends only what was not asked")
    if not response.flags & dns.flags.TC:
        return response
    with socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        await loop.sock_connect(sock, address.to_sockaddr())
        await loop.sock_sendall(sock, len(wire).to_bytes(2, "big") + wire)
        length = int.from_bytes(await _receive(sock, 2), "big")
        if length > _MAX_ANSWER:
            raise BadAnswer(f"{server} answers with {length} octets")
        response = _read(await _receive(sock, length), query)
    if response is None or response.flags & dns.flags.TC:
        raise BadAnswer(f"{server} answers another question over TCP, or no whole one")
    return response


async def _receive(sock: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        more = await loop.sock_recv(sock, count - len(data))
        if not more:
            raise BadAnswer("the connection ended in the middle of an answer")
        data += more
    return data


def _read(data: bytes, query: dns.message.QueryMessage) -> dns.message.Message | None:
    """Return the response in ``data``, None if it does not answer ``query``: somebody else may have sent it."""
    if data[:2] != query.id.to_bytes(2, "big"):
        return None
    try:
        response = dns.message.from_wire(data, ignore_trailing=True, raise_on_truncation=True)
    except dns.message.Truncated as error:
        response = error.message()  # type: ignore[no-untyped-call]
    except (dns.exception.DNSException, ValueError):
        return None
    return response if query.is_response(response) and response.question == query.question else None


def _answer(response: dns.message.Message) -> Answer:
    code = response.rcode()
    if code not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        raise BadAnswer(dns.rcode.to_text(code))
    assert isinstance(response, dns.message.QueryMessage)
    chain = response.resolve_chaining()
    if chain.answer is None:
        return Answer((), min(chain.minimum_ttl, _MAX_NEGATIVE_TTL), exists=code == dns.rcode.NOERROR)
    found = (ip_address(record.address) for record in list(chain.answer)[:_MAX_ADDRESSES])
    return Answer(tuple(found), min(chain.minimum_ttl, _MAX_TTL))

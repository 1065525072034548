"""What a connection is known by when its way is chosen: from its target and the extensions of its client."""

from __future__ import annotations

import contextlib
import socket
from ipaddress import IPv4Address

from ...core.address import Authority, IPAddress, unmap
from ...core.auth import User
from ...core.client import ClientAddress, ListenerName, source_prefix
from ...core.extensions import Extensions
from ...core.request_log import RouteName
from ...routes.hosts import canonical_host
from ...routes.model import Key, Protocol
from ...routes.table import Question, RouteTable
from ..socks5.machine import Request as SocksRequest
from ..socks5.wire import Command
from ..tls.client_hello import ClientHello

__all__ = ["brief_question_of", "is_local_name", "key_of", "literal_of", "protocol_of", "question_of"]

_COMMANDS = {Command.CONNECT: Protocol.SOCKS, Command.BIND: Protocol.BIND, Command.UDP_ASSOCIATE: Protocol.UDP}
_HTTP = {"connect": Protocol.CONNECT, "forward": Protocol.HTTP}


def protocol_of(known: dict[type, object]) -> Protocol:
    """Return how the client asked, of the latest extensions by type."""
    asked = known.get(SocksRequest)
    if isinstance(asked, SocksRequest):
        return _COMMANDS[asked.command]
    route = known.get(RouteName)
    if isinstance(route, RouteName):
        return _HTTP.get(route.name, Protocol.HTTP)
    return Protocol.TLS if ClientHello in known else Protocol.FORWARD


def literal_of(host: IPAddress | str) -> IPAddress | None:
    """Return the address that ``host`` is: also where it is written as only inet_aton(3) reads it (``127.1``,
    ``0x7f000001``), for whoever looks it up elsewhere may."""
    if not isinstance(host, str):
        return unmap(host)
    text = host.strip().removesuffix(".")
    if text[:1].isdigit():
        with contextlib.suppress(OSError):
            return IPv4Address(socket.inet_aton(text))
    with contextlib.suppress(ValueError):
        return Authority.of(text, 0).ip
    return None


def is_local_name(host: str) -> bool:
    """Whether a name means whoever looks it up (RFC 6761 section 6.3)."""
    name = canonical_host(host)
    return name in ("localhost", "localhost.localdomain", "ip6-localhost") or name.endswith(".localhost")


def question_of(target: Authority, extensions: Extensions | None) -> Question:
    """Return what the routes are asked."""
    ip = literal_of(target.host)
    host = None if ip is not None else str(target.host)
    if extensions is None:
        return Question(target.port, host, ip)
    known = extensions.latest()
    user, listener, client, hello = map(known.get, (User, ListenerName, ClientAddress, ClientHello))
    return Question(
        target.port,
        host,
        ip,
        protocol_of(known),
        user.name if isinstance(user, User) else None,
        listener.name if isinstance(listener, ListenerName) else None,
        client.address.ip if isinstance(client, ClientAddress) else None,
        hello.server_name if isinstance(hello, ClientHello) else None,
    )


def brief_question_of(target: Authority, extensions: Extensions | None, table: RouteTable) -> Question:
    """Return what ``table`` asks of a target that is an address, and no more: for callbacks."""
    ip = target.ip
    assert ip is not None
    if ip.version == 6:
        ip = unmap(ip)
    if extensions is None:
        return Question(target.port, None, ip)
    user = extensions.get(User) if table.asks_user else None
    listener = extensions.get(ListenerName) if table.asks_listener else None
    client = extensions.get(ClientAddress) if table.asks_client else None
    hello = extensions.get(ClientHello) if table.asks_name else None
    return Question(
        target.port,
        None,
        ip,
        protocol_of(extensions.latest()) if table.asks_protocol else Protocol.FORWARD,
        None if user is None else user.name,
        None if listener is None else listener.name,
        None if client is None else client.address.ip,
        None if hello is None else hello.server_name,
    )


def key_of(key: Key, question: Question, extensions: Extensions | None) -> bytes:
    """Return what stays together; b"" for what has no such key."""
    if key is Key.TARGET:
        return (canonical_host(question.host) if question.host is not None else str(question.ip)).encode()
    if key is Key.SOURCE or (question.user is None and key is Key.USER):
        return b"" if question.client is None else repr(source_prefix(question.client)).encode()
    user = None if extensions is None else extensions.get(User)
    if user is None:
        return b"" if question.client is None else repr(source_prefix(question.client)).encode()
    session = user.options.get("session") if key is Key.SESSION else None
    return user.name.encode() if session is None else f"{user.name}\0{session}".encode()

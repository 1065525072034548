"""Who the client is, behind proxies in front and for servers behind: Forwarded (RFC 7239) and X-Forwarded-For.

These fields are hearsay. What they say is believed only from networks that the operator names, and what anybody else
sends in them is removed: else a client could choose the address that policy and logs see.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final

from ....core.address import IPAddress, SocketAddress, unmap
from ....core.client import ClientAddress, TrustedPeer, client_address, local_address
from ....core.service import Output, Service
from ....core.source_policy import SourcePolicy
from ....core.stream import Stream
from ..exchange.quick import Exchange, decide_aside, decides, quick_of
from ..message.errors import ClientDenied, HttpError
from ..message.headers import Headers
from ..message.model import Request, Response

__all__ = ["ForwardedField", "ForwardedLayer", "TrustedPeersLayer"]

_X_FIELDS: Final = (
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-real-ip",
    # Other spellings of the scheme that servers believe.
    "x-forwarded-protocol",
    "x-forwarded-scheme",
    "x-forwarded-ssl",
    "x-scheme",
    "x-url-scheme",
    "front-end-https",
)
_ALL_FIELDS: Final = frozenset(name.encode() for name in (*_X_FIELDS, "forwarded"))
_PAIR: Final = re.compile(
    r"""[ \t]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)=([!#$%&'*+.^_`|~0-9A-Za-z-]+|"(?:[^"\\]|\\.)*")[ \t]*([;,]|$)"""
)
_WITH_PORT: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::[0-9]{1,5})?")


class ForwardedField(enum.Enum):
    """In which form the client is told."""

    X_FORWARDED = "x-forwarded-for"
    """X-Forwarded-For, -Proto and -Host: what most software reads."""
    FORWARDED = "forwarded"
    """Forwarded, as standardized."""


class TrustedPeersLayer:
    """Marks connections of peers within ``trusted`` as those of proxies, which are never struck: who caused an error
    there is not known from the connection."""

    accepts = Stream

    def __init__(self, trusted: Iterable[str]) -> None:
        self._trusted: tuple[IPv4Network | IPv6Network, ...] = tuple(ip_network(text) for text in trusted)

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def serve(stream: Stream, /) -> Output:
            peer = client_address(stream)
            if peer is not None and any(peer.ip in network for network in self._trusted):
                stream.extensions.add(TrustedPeer(peer.ip))
            return await inner(stream)

        return serve


class ForwardedLayer:
    """Tells the server behind who the client is, in ``field``, or nothing if that is None.

    From a peer within ``trusted`` (CIDR text) the same field is read: the nearest address that is not itself
    trusted becomes the request's :class:`~rama_ebpf.core.client.ClientAddress`, and the peer is appended to the
    list. From others, and in the form that is not used, these fields are removed.

    With ``policy`` rules and bans judge the client that a trusted peer names, at each request: one whom they refuse
    gets 403 (:class:`ClientDenied`), and a field that is malformed 400, for it could hide who it is. Where the peer
    names nobody, or by a word (``unknown``, ``_hidden``), the peer itself stays the client.
    """

    accepts = Request

    def __init__(
        self,
        field: ForwardedField | None = ForwardedField.X_FORWARDED,
        *,
        trusted: Iterable[str] = (),
        policy: SourcePolicy | None = None,
    ) -> None:
        self._field = field
        self._policy = policy
        self._trusted: tuple[IPv4Network | IPv6Network, ...] = tuple(ip_network(text) for text in trusted)

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Any:
            if self._apply(request) and self._policy is not None:
                await self._judge(self._policy, request)
            return await inner(request)

        decide = quick_of(inner)
        if decide is not None:

            def quick_exchange(request: Request) -> Exchange | None:
                told = replace(request, extensions=request.extensions.fork())  # for nothing may have happened
                if self._apply(told) and self._policy is not None:
                    return None  # policy has to be waited for
                return decide_aside(decide, request, told)

            decides(serve, quick_exchange)
        return serve

    def _trusts(self, ip: IPAddress) -> bool:
        return any(ip in network for network in self._trusted)

    async def _judge(self, policy: SourcePolicy, request: Request) -> None:
        client, local = client_address(request), local_address(request)
        assert client is not None
        verdict = await policy.verdict(client.ip, 0 if local is None else local.port)
        if not verdict.allowed:
            raise ClientDenied(f"policy refuses {client.ip} (rule {verdict.rule})", rule=verdict.rule)

    def _apply(self, request: Request) -> bool:
        """Read and write the fields; return whether a trusted peer has named the client."""
        peer = client_address(request)
        believed = peer is not None and self._trusts(peer.ip)
        if not believed:  # as most are: nothing that they say is kept
            request.headers = request.headers._replaced(_ALL_FIELDS, self._of_peer(request, peer))
            return False
        headers = request.headers = request.headers.copy()
        if self._field is not ForwardedField.X_FORWARDED:
            headers.remove(*_X_FIELDS)
        if self._field is not ForwardedField.FORWARDED:
            headers.remove("forwarded")
        if self._field is None or peer is None:
            return False
        if self._field is ForwardedField.X_FORWARDED:
            told, whole = _told(headers), True
        else:
            told, whole = _told_rfc7239(headers)
        if not whole and self._policy is not None:
            raise HttpError(400, "the Forwarded field is malformed", proxy_error="http_request_error")
        named = self._believe(request, told)
        if self._field is ForwardedField.X_FORWARDED:
            headers.set("X-Forwarded-For", ", ".join([*headers.get_all("x-forwarded-for"), str(peer.ip)]))
            for name, value in (("X-Forwarded-Proto", request.arrived_by), ("X-Forwarded-Host", request.authority)):
                if name not in headers:
                    headers.set(name, value)
        else:
            headers.set("Forwarded", ", ".join([*headers.get_all("forwarded"), _element(peer.ip, request)]))
        return named

    def _of_peer(self, request: Request, peer: SocketAddress | None) -> list[tuple[str, str]]:
        """What is told of a client that is its own connection's peer."""
        if self._field is None or peer is None:
            return []
        if self._field is ForwardedField.FORWARDED:
            return [("Forwarded", _element(peer.ip, request))]
        return [
            ("X-Forwarded-For", _text(peer.ip)),
            ("X-Forwarded-Proto", request.arrived_by),
            ("X-Forwarded-Host", request.authority),
        ]

    def _believe(self, request: Request, told: list[IPAddress | None]) -> bool:
        client: IPAddress | None = None
        for ip in reversed(told):
            if ip is None:
                break  # obfuscated or malformed: what is further away is known from nobody we trust
            client = ip
            if not self._trusts(ip):
                break
        if client is not None:
            request.extensions.add(ClientAddress(SocketAddress(client, 0)))
        return client is not None


def _told(headers: Headers) -> list[IPAddress | None]:
    members = [member for value in headers.get_all("x-forwarded-for") for member in value.split(",")]
    return [_address(member.strip()) for member in members]


def _told_rfc7239(headers: Headers) -> tuple[list[IPAddress | None], bool]:
    """Return the ``for`` of each element, None where it is no address, and whether all is well-formed (RFC 7239
    section 4); a malformed list ends in None."""
    text = ", ".join(headers.get_all("forwarded"))
    told: list[IPAddress | None] = []
    current: IPAddress | None = None
    seen: set[str] = set()
    offset = 0
    while offset < len(text):
        match = _PAIR.match(text, offset)
        if match is None:
            return [*told, None], False
        name, value, delimiter = match.groups()
        name = name.lower()
        if name in seen:
            return [*told, None], False  # "MUST NOT occur more than once per field-value"
        seen.add(name)
        if name == "for":
            text_of = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
            # Section 6.1: an IPv6 address stands in brackets.
            current = _address(text_of) if text_of.startswith("[") or ":" not in text_of.partition(":")[2] else None
        if delimiter != ";":
            told.append(current)
            current = None
            seen.clear()
        offset = match.end()
    return told, not text.rstrip().endswith((",", ";"))


def _address(text: str) -> IPAddress | None:
    match = _WITH_PORT.fullmatch(text)
    try:
        return unmap(ip_address(text if match is None else match[1] or match[2]))
    except ValueError:
        return None


@functools.lru_cache(4096)
def _text(ip: IPAddress) -> str:
    return str(ip)


def _element(ip: IPAddress, request: Request) -> str:
    """One element of Forwarded (RFC 7239 section 4)."""
    element = f"for={_node(ip)};proto={request.arrived_by}"
    return f'{element};host="{request.authority}"' if request.authority else element


def _node(ip: IPAddress) -> str:
    return f'"[{ip}]"' if isinstance(ip, IPv6Address) else str(ip)

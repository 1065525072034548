"""One hop: having a parent at the other end of a stream connect us to the next one."""

from __future__ import annotations

import errno
import ssl
from typing import Final

from ...core.address import Authority
from ...core.errors import PeerClosed, ProtocolError
from ...core.stream import Stream
from ...routes.blame import Fault, http_fault, socks4_fault
from ...routes.model import Parent
from ..http.proxy.tunnel_client import STATUS_ERRNO, tunnel
from ..socks5.client import handshake
from ..socks5.wire import Command
from ..tls import TlsStream
from . import socks4
from .failure import WayFailed, failure_of

__all__ = ["pass_hop", "secure"]

_LONGEST: Final = 600.0
"""Seconds: the connection as a whole has its deadline."""
_SOCKS4_ERRNO = {91: errno.ECONNREFUSED, 92: errno.EKEYREJECTED, 93: errno.EKEYREJECTED}


async def secure(stream: Stream, parent: Parent, context: ssl.SSLContext | None) -> Stream:
    """Speak TLS with a parent that wants it. Raises :class:`WayFailed`."""
    if not parent.in_tls:
        return stream
    assert context is not None
    try:
        return await TlsStream.connect(stream, context, server_name=str(parent.address.host), timeout=_LONGEST)
    except BaseException as error:
        if (failure := failure_of(error, f"no TLS with {parent.address}", Fault.WAY)) is None:
            raise
        raise failure from error


async def pass_hop(stream: Stream, parent: Parent, onward: Authority, *, last: bool) -> None:
    """Have ``parent`` connect us to ``onward``: the target if it is the ``last``, else the next parent. Raises
    :class:`WayFailed`; what it says about the next parent is the way's fault."""
    doing = f"cannot reach {onward} through {parent.address}"
    try:
        await _ask(stream, parent, onward, doing)
    except BaseException as error:
        if (failure := failure_of(error, doing, Fault.WAY)) is None:
            raise
        if not last and failure.fault is not Fault.LOGIN:
            raise WayFailed(errno.EIO, str(failure.strerror), Fault.WAY) from error
        if failure is error:
            raise
        raise failure from error


async def _ask(stream: Stream, parent: Parent, onward: Authority, doing: str) -> None:
    if parent.speaks_http:
        status, reason = await tunnel(stream, onward, parent.credentials)
        if not 200 <= status < 300:
            number = STATUS_ERRNO.get(status, errno.EIO)
            raise WayFailed(number, f"{doing}: the proxy says {status} {reason}", http_fault(status))
    elif parent.scheme.startswith("socks5"):
        await handshake(stream, Command.CONNECT, onward, parent.credentials)
    else:
        await _ask_socks4(stream, parent, onward, doing)


async def _ask_socks4(stream: Stream, parent: Parent, onward: Authority, doing: str) -> None:
    try:
        request = socks4.request_bytes(onward, "" if parent.credentials is None else parent.credentials.username)
    except ValueError as error:
        raise WayFailed(errno.EAFNOSUPPORT, f"{doing}: {error}", Fault.UNABLE) from error
    await stream.write(request)
    while len(stream.buffered) < socks4.REPLY_BYTES:
        if stream.buffered:
            socks4.read_reply(stream.buffered + b"\0")  # another protocol is known by its first byte
        if not await stream.fill(socks4.REPLY_BYTES):
            raise PeerClosed("the SOCKS4 proxy closed before its reply")
    code = socks4.read_reply(stream.buffered)
    stream.consume(socks4.REPLY_BYTES)
    if code not in (90, *_SOCKS4_ERRNO):
        raise ProtocolError(f"the SOCKS4 proxy answers with code {code}")
    if code != 90:
        raise WayFailed(_SOCKS4_ERRNO[code], f"{doing}: the SOCKS4 proxy says {code}", socks4_fault(code))

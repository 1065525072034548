"""The client of an HTTP proxy's CONNECT: a connector whose streams go through the proxy (RFC 9110 section 9.3.6)."""

from __future__ import annotations

import asyncio
import errno
import re
from base64 import b64encode
from typing import Final

from ....core.address import Authority
from ....core.auth import Credentials
from ....core.errors import PeerClosed
from ....core.service import Service, check_fit
from ....core.stream import Stream
from ...connect import ConnectError, ResolveError, reach_proxy, upstream_failure
from ..h1.heads import head_end, parse_response
from ..message.errors import MalformedMessage
from ..message.limits import HttpLimits

__all__ = ["STATUS_ERRNO", "HttpTunnelClient", "basic", "tunnel"]

_LIMITS: Final = HttpLimits(head=16 * 1024)

_SPEAKS_HTTP: Final = b"HTTP/1."
_HOST: Final = re.compile(r"[!-.0-~]+")

STATUS_ERRNO: Final = {
    403: errno.EACCES,
    405: errno.EOPNOTSUPP,
    407: errno.EKEYREJECTED,
    501: errno.EOPNOTSUPP,
    502: errno.EHOSTUNREACH,
    503: errno.EHOSTUNREACH,
    504: errno.ETIMEDOUT,
}
"""What a proxy means by its status, in the terms in which a connector fails; every other one is EIO."""


class HttpTunnelClient:
    """Reaches targets through the HTTP proxy at ``proxy`` with CONNECT; itself a service from :class:`Authority` to
    :class:`Stream`, like the ``connector`` by which it reaches the proxy, so that chains are built by nesting.

    A target that is a name is resolved by the proxy. ``credentials`` are sent as Basic (RFC 7617); ``timeout``
    (seconds) bounds the exchange. Whatever goes wrong raises :class:`ConnectError` with the first cause attached: a
    failing proxy must not look like a misbehaving client.
    """

    accepts = Authority

    def __init__(
        self,
        connector: Service[Authority, Stream],
        proxy: Authority,
        *,
        credentials: Credentials | None = None,
        timeout: float = 10.0,
    ) -> None:
        if credentials is not None and ":" in credentials.username:
            raise ValueError("a user name with a colon cannot be sent as Basic (RFC 7617 section 2)")
        check_fit(self, Authority, connector)
        self._connector = connector
        self._proxy = proxy
        self._credentials = credentials
        self._timeout = timeout

    async def __call__(self, target: Authority, /) -> Stream:
        _request(target, self._credentials)  # a name that cannot be asked for is not the proxy's fault
        stream = await reach_proxy(self._connector, self._proxy)
        try:
            async with asyncio.timeout(self._timeout):
                status, reason = await tunnel(stream, target, self._credentials)
        except BaseException as error:
            await stream.close()
            if (failure := upstream_failure(error, f"cannot reach {target} through {self._proxy}")) is None:
                raise
            raise failure from error
        if not 200 <= status < 300:
            await stream.close()
            message = f"cannot reach {target} through {self._proxy}: the proxy says {status} {reason}"
            raise ConnectError(STATUS_ERRNO.get(status, errno.EIO), message)
        return stream


async def tunnel(stream: Stream, target: Authority, credentials: Credentials | None) -> tuple[int, str]:
    """Ask the proxy at the other end of ``stream`` for a tunnel to ``target``; return its status and reason.

    Bytes that follow stay in the stream's read-ahead buffer. Raises :class:`ResolveError` for a name that is none,
    :class:`~..message.errors.MalformedMessage`, :class:`PeerClosed` or OSError; the caller closes.
    """
    await stream.write(_request(target, credentials))
    return await _response(stream)


def basic(credentials: Credentials) -> str:
    """Return the value of Proxy-Authorization (RFC 7617)."""
    login = f"{credentials.username}:{credentials.password}"
    return f"Basic {b64encode(login.encode()).decode()}"


def _request(target: Authority, credentials: Credentials | None) -> bytes:
    authority = str(target)
    if isinstance(target.host, str):
        try:
            authority = f"{target.host.encode('idna').decode()}:{target.port}"
        except UnicodeError as error:
            raise ResolveError(f"{target.host!r} is not a valid domain name: {error}") from error
        if _HOST.fullmatch(authority) is None:
            raise ResolveError(f"{target.host!r} is not a valid domain name")
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if credentials is not None:
        lines.append(f"Proxy-Authorization: {basic(credentials)}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


async def _response(stream: Stream) -> tuple[int, str]:
    """Read the final response's head; what follows it stays unread, for it is the tunnel's."""
    interim = 0
    searched = 0
    while True:
        data = bytearray(stream.buffered)
        if not _SPEAKS_HTTP.startswith(data[: len(_SPEAKS_HTTP)]):  # known at once, and not when the time is up
            raise MalformedMessage("the proxy's answer does not begin as HTTP does")
        end = head_end(data, searched, _LIMITS, request=False)
        if not end:
            searched = len(data)
            if not await stream.fill():
                raise PeerClosed("the HTTP proxy closed before its response")
            continue
        head = parse_response(bytes(data[:end]), _LIMITS, method="CONNECT")
        stream.consume(end)
        searched = 0
        if head.status >= 200:
            return head.status, head.reason
        interim += 1
        if interim > _LIMITS.interim:
            raise MalformedMessage("too many interim responses")

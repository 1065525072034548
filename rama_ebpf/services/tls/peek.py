"""Looking at a ClientHello without answering it: the layer in front of routing, policy and termination."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from ...core.at_once import NOTHING, Entered, Visit
from ...core.client import client_address
from ...core.errors import HandshakeTimeout, PeerClosed
from ...core.first_bytes import FirstBytes, Refused
from ...core.notes import Note
from ...core.service import Output, Service, check_fit
from ...core.shares import Held, ShareExceeded, SourceShare
from ...core.stream import MAX_UNREAD, Stream
from ..protocols import is_tls
from .alert import Alert
from .client_hello import DEFAULT_LIMIT, ClientHello, ClientHelloParser
from .errors import AlertError, NotTls
from .fingerprint import Ja3, Ja4

__all__ = ["TlsPeekLayer", "add_client_hello", "peek_client_hello"]


async def peek_client_hello(stream: Stream, *, timeout: float | None = 10.0, limit: int = DEFAULT_LIMIT) -> ClientHello:
    """Read ahead until ``stream`` shows a complete ClientHello, and consume nothing.

    ``timeout`` is in seconds, None where the caller keeps the time; ``limit`` in bytes (at most
    :data:`~rama_ebpf.core.stream.MAX_UNREAD`). Raises :class:`NotTls`, :class:`AlertError`, :class:`HandshakeTimeout`,
    or :class:`PeerClosed` at an early EOF.
    """
    parser = ClientHelloParser(limit)
    hello = parser.feed(stream.buffered)
    if hello is not None:
        return hello  # as nearly always: it comes in one segment, and was read to tell the protocol
    if timeout is None:
        return await _read_hello(stream, parser, limit)
    try:
        async with asyncio.timeout(timeout):
            return await _read_hello(stream, parser, limit)
    except TimeoutError as error:
        raise HandshakeTimeout(f"no complete ClientHello within {timeout} s") from error


async def _read_hello(stream: Stream, parser: ClientHelloParser, limit: int) -> ClientHello:
    while True:
        count = await stream.fill(limit)
        if not count:
            raise PeerClosed(f"client closed after {len(stream.buffered)} bytes of its ClientHello")
        hello = parser.feed(stream.buffered[-count:])
        if hello is not None:
            return hello


def add_client_hello(stream: Stream, hello: ClientHello) -> None:
    """Add ``hello`` and its fingerprints to the stream's extensions, unless they are there already.

    Its server name and JA4 are noted for the access log, which is where the rules about them come from.
    """
    extensions = stream.extensions
    if extensions.get(ClientHello) == hello:
        return
    ja4 = Ja4.of(hello)
    for value in (hello, Ja3.of(hello), ja4):
        extensions.add(value)
    if hello.server_name is not None:
        extensions.add(Note("sni", hello.server_name))
    extensions.add(Note("ja4", ja4.value))


_LEFT: Final = Refused("peer_closed", "closed without a word", reset=True)
_NOT_TLS: Final = Refused("not_tls", "not TLS", Alert.UNEXPECTED_MESSAGE.record)


def refuse_what_is_not_tls(data: bytes) -> Refused | None:
    """Judge the first bytes of a client that is to speak TLS; see :mod:`rama_ebpf.core.first_bytes`."""
    if not data:
        return _LEFT
    if data[0] & 0x80 and (len(data) < 3 or data[2] == 1):
        return None  # may be a ClientHello of SSL 2.0, which has an answer of its own
    return _NOT_TLS if is_tls(data) is False else None


class TlsPeekLayer:
    """Adds :class:`ClientHello`, :class:`Ja3` and :class:`Ja4` to a stream's extensions, and consumes nothing.

    A stream whose first bytes are not TLS goes to ``fallback``; without one the client is sent an alert and
    :class:`NotTls` is raised. A ClientHello that is malformed, above ``limit`` bytes, cut short or not complete
    within ``timeout`` seconds proves nothing: it is refused, with an alert where there is a protocol error, unless
    ``fail_open`` sends it to ``fallback`` as well. The fallback finds every byte still unread. Of one source as many
    are waited for as ``handshakes`` lets in; the others are sent an alert
    (:class:`~rama_ebpf.core.shares.ShareExceeded`).
    """

    accepts = Stream
    adds = (ClientHello, Ja4)

    def __init__(
        self,
        *,
        fallback: Service[Stream, Any] | None = None,
        fail_open: bool = False,
        timeout: float = 10.0,
        limit: int = DEFAULT_LIMIT,
        handshakes: SourceShare | None = None,
    ) -> None:
        if fail_open and fallback is None:
            raise ValueError("fail_open needs a fallback")
        if timeout <= 0:
            raise ValueError(f"timeout must be positive, not {timeout}")
        if not 512 <= limit <= MAX_UNREAD:
            raise ValueError(f"limit must be 512-{MAX_UNREAD} bytes, not {limit}")
        if fallback is not None:
            check_fit(self, Stream, fallback)
        self._fallback = fallback
        self._fail_open = fail_open
        self._timeout = timeout
        self._limit = limit
        self._handshakes = SourceShare(Held.HANDSHAKES, 0) if handshakes is None else handshakes

    def first_bytes(self, _inner: FirstBytes | None) -> FirstBytes | None:
        """Refuse what is no TLS by its first bytes, unless there is somebody else for it."""
        return FirstBytes(refuse_what_is_not_tls) if self._fallback is None else None

    def enter(self, visit: Visit) -> Entered:
        """In callbacks (:mod:`rama_ebpf.core.at_once`), for a ClientHello that is all here; whoever has none, or more
        handshakes than it may, is the coroutine's."""
        stream = visit.stream
        hello = ClientHelloParser(self._limit).feed(stream.buffered)
        if hello is None:
            raise PeerClosed("no complete ClientHello yet")
        client = client_address(stream)
        place = None if client is None else self._handshakes.enter(client.ip, ask_again=True)
        if place is not None:
            self._handshakes.leave(place)
        add_client_hello(stream, hello)
        return NOTHING

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def peek(stream: Stream, /) -> Output:
            client = client_address(stream)
            try:
                with self._handshakes.hold(None if client is None else client.ip):
                    hello = await peek_client_hello(stream, timeout=self._timeout, limit=self._limit)
            except ShareExceeded:
                await stream.close_after(Alert.INTERNAL_ERROR.record)
                raise
            except (AlertError, HandshakeTimeout, PeerClosed) as error:
                if self._fallback is not None and (self._fail_open or isinstance(error, NotTls)):
                    answer: Output = await self._fallback(stream)
                    return answer
                if isinstance(error, AlertError):
                    await stream.close_after(error.wire)
                raise
            add_client_hello(stream, hello)
            return await inner(stream)

        return peek

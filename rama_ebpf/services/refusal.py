"""Turning a client away in the protocol that it speaks, without serving it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Hashable
from typing import Final

from ..core.adoption import AdoptedStream
from ..core.at_once import NOTHING, Entered, Visit, entered_by
from ..core.auth import Credentials
from ..core.client import client_address
from ..core.errors import RamaError
from ..core.first_bytes import FirstBytes
from ..core.service import Output, Service
from ..core.shares import Held, ShareExceeded, SourceShare
from ..core.socket_stream import reset_on_close
from ..core.stream import Stream
from .protocols import is_http, is_socks, is_tls
from .socks5.machine import MAX_MESSAGE, Request, ServerMachine
from .socks5.wire import Method, Reply
from .tls.alert import Alert

__all__ = ["Refusal", "SourceShareLayer", "TurnAway", "refuse_now"]

_SPOKEN: Final = 16 * 1024
_NO_METHOD: Final = bytes((5, Method.NO_ACCEPTABLE))
_H2_PREFACE: Final = b"PRI * HTTP/2.0\r\n"
# SETTINGS without any, and GOAWAY with ENHANCE_YOUR_CALM (RFC 9113 sections 6.5, 6.8 and 7).
_H2_CALM: Final = bytes.fromhex("000000 04 00 00000000000008 07 00 00000000 00000000 0000000b")


class Refusal:
    """Sans-I/O: what a client is to be told who is not served now, by the protocol that its first bytes show.

    HTTP gets 503 with Retry-After, HTTP/2 GOAWAY with ENHANCE_YOUR_CALM, TLS the alert internal_error (RFC 8446
    section 6.2: such as a failure to allocate), SOCKS its general failure; a password is not looked at. Other bytes
    get nothing.
    """

    def __init__(self, retry_after: float = 1.0) -> None:
        self._retry_after = max(1, math.ceil(retry_after))
        self._socks: ServerMachine | None = None

    def receive(self, data: bytes) -> tuple[bytes, int, bool]:
        """Take all bytes that are there: return what to send, how many were used up, and whether that was all."""
        if self._socks is None:
            if not data:
                return b"", 0, False
            if is_socks(data):
                self._socks = ServerMachine((Method.NONE, Method.PASSWORD))
            elif (tls := is_tls(data)) or tls is None:
                return (Alert.INTERNAL_ERROR.record, len(data), True) if tls else (b"", 0, False)
            elif (http := is_http(data)) or http is None:
                return (self._http(data), len(data), True) if http else (b"", 0, False)
            else:
                return b"", len(data), True
        return self._over_socks(self._socks, data)

    def _http(self, data: bytes) -> bytes:
        if data.startswith(_H2_PREFACE):
            return _H2_CALM
        fields = f"Retry-After: {self._retry_after}\r\nContent-Length: 0\r\nConnection: close\r\n"
        return f"HTTP/1.1 503 Service Unavailable\r\n{fields}\r\n".encode("ascii")

    @staticmethod
    def _over_socks(machine: ServerMachine, data: bytes) -> tuple[bytes, int, bool]:
        out, used, ended = b"", 0, False
        while not ended and used < len(data):
            try:
                event, count = machine.receive(data[used:])
            except RamaError:
                return out + machine.data_to_send(), used, True
            if event is None:
                break
            used += count
            if isinstance(event, Credentials):
                machine.refuse()
                ended = True
            elif isinstance(event, Request):
                machine.reply(Reply.GENERAL_FAILURE)
                ended = True
            out += machine.data_to_send()
        return out, used, ended


def refuse_now(sock: socket.socket) -> None:
    """Tell a client why it is not served, as far as what it has sent shows how, and close in order. Never waits."""
    with contextlib.suppress(OSError):  # it has sent nothing yet, or has gone
        data = sock.recv(_SPOKEN, socket.MSG_DONTWAIT)
        out, _used, ended = Refusal().receive(data)
        if out and not ended:
            out = _NO_METHOD  # there is no time for another message of SOCKS
        if out:
            sock.send(out, socket.MSG_DONTWAIT)
    reset_on_close(sock, False)  # nothing was lost, the client is only not served
    sock.close()


class TurnAway:
    """Refuses clients as :class:`Refusal` says, within ``timeout`` seconds each, and at most ``most`` at once: to be
    refused politely must not be worth anything. The others are only closed."""

    def __init__(self, *, timeout: float = 1.0, most: int = 256) -> None:
        self._timeout = timeout
        self._most = most
        self._live = 0

    async def __call__(self, stream: Stream, retry_after: float = 1.0) -> None:
        """Tell the client, and close ``stream``. Never raises for a client that has gone."""
        if self._live >= self._most:
            await stream.close()
            return
        self._live += 1
        try:
            refusal, out, ended = Refusal(retry_after), b"", False
            with contextlib.suppress(OSError, RamaError):  # TimeoutError, too: it has had its time
                async with asyncio.timeout(self._timeout):
                    while not ended:
                        out, used, ended = refusal.receive(stream.buffered)
                        stream.consume(used)
                        if not ended:
                            await stream.write(out)
                            if not await stream.fill(MAX_MESSAGE):
                                break
            await stream.close_after(out if ended else b"", timeout=self._timeout)
        finally:
            self._live -= 1


class SourceShareLayer:
    """Bounds how many connections one source has at once: what is above ``share`` is told so in its protocol, and
    closed. A place is held until the service returns. Raises :class:`~rama_ebpf.core.shares.ShareExceeded` then.
    """

    accepts = Stream

    def __init__(self, share: SourceShare | None = None) -> None:
        self.share = SourceShare(Held.CONNECTIONS) if share is None else share
        self._turn_away = TurnAway()

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        """First bytes are judged as inside: what is refused by them needs nothing of this layer."""
        return inner

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def serve(stream: Stream, /) -> Output:
            place = entered_by(stream, self)
            if place is None:
                try:
                    place = self._place(stream)
                except ShareExceeded as error:
                    await self._turn_away(stream, error.retry_after)
                    raise
            try:
                return await inner(stream)
            finally:
                place.leave(None)

        return serve

    def enter(self, visit: Visit) -> Entered:
        """In callbacks (:mod:`rama_ebpf.core.at_once`); whoever is above the share is the coroutine's."""
        return self._place(visit.stream, ask_again=True)

    def adopt(self, stream: AdoptedStream) -> Entered:
        """Count it, also above the share (:mod:`rama_ebpf.core.adoption`)."""
        client = client_address(stream)
        source = None if client is None else self.share.add(client.ip)
        return NOTHING if source is None else _Place(self.share, source)

    def _place(self, stream: Stream, *, ask_again: bool = False) -> Entered:
        client = client_address(stream)
        source = None if client is None else self.share.enter(client.ip, ask_again=ask_again)
        return NOTHING if source is None else _Place(self.share, source)


class _Place:
    """One of a source's places."""

    __slots__ = ("_share", "_source")

    def __init__(self, share: SourceShare, source: Hashable) -> None:
        self._share = share
        self._source = source

    def leave(self, _error: BaseException | None, /) -> None:
        """Give it back."""
        self._share.leave(self._source)

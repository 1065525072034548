"""Terminating TLS: the layer that turns a stream of ciphertext into one of plaintext for the service inside."""

from __future__ import annotations

import asyncio
from typing import Any

from ...core.errors import HandshakeTimeout
from ...core.first_bytes import FirstBytes
from ...core.service import Output, Service, check_fit
from ...core.shares import ShareExceeded, SourceShare
from ...core.stream import Stream
from .alert import Alert
from .certs import SelectContext
from .client_hello import ClientHello
from .errors import AlertError, NotTls
from .fingerprint import Ja4
from .limit import HandshakeLimit
from .match import TlsPolicyLayer
from .peek import add_client_hello, peek_client_hello, refuse_what_is_not_tls
from .stream import TlsStream

__all__ = ["TlsTerminateLayer"]


class TlsTerminateLayer:
    """Does the server's side of TLS and hands a :class:`TlsStream` to the service inside.

    A client that does not speak TLS goes to ``fallback``, its bytes unread, or without one is sent an alert.
    ``policy`` may refuse a client for what its ClientHello shows. ``certificates`` chooses the context from the whole
    ClientHello before anything is answered, and may wait while it does. ``handshake_timeout`` (seconds) covers
    everything from the first byte due to the end of the handshake. At most ``max_handshakes`` are under way at once,
    and of one source as many as ``handshakes`` lets in (see :class:`~.limit.HandshakeLimit`). What comes above the
    first is cut (:class:`~rama_ebpf.core.errors.LimitExceeded`), above the second sent the alert internal_error
    (:class:`~rama_ebpf.core.shares.ShareExceeded`). ``ragged_eof``: see :class:`TlsStream`.

    The ClientHello with its fingerprints and the negotiated :class:`~.stream.TlsParameters` are added to the
    extensions. When the service returns the stream is closed with close_notify, when it raises it is cut. Raises
    :class:`AlertError` and what ``policy`` and :meth:`TlsStream.accept` raise, after the client has been told.
    """

    accepts = Stream
    provides = TlsStream
    adds = (ClientHello, Ja4)

    def __init__(
        self,
        certificates: SelectContext,
        *,
        fallback: Service[Stream, Any] | None = None,
        policy: TlsPolicyLayer | None = None,
        handshake_timeout: float = 10.0,
        max_handshakes: int = 1000,
        handshakes: SourceShare | None = None,
        ragged_eof: bool = False,
    ) -> None:
        if handshake_timeout <= 0:
            raise ValueError(f"handshake_timeout must be positive, not {handshake_timeout}")
        self._certificates = certificates
        if fallback is not None:
            check_fit(self, Stream, fallback)
        self._fallback = fallback
        self._policy = policy
        self._timeout = handshake_timeout
        self._limit = HandshakeLimit(max_handshakes, handshakes)
        self._ragged_eof = ragged_eof

    def first_bytes(self, _inner: FirstBytes | None) -> FirstBytes | None:
        """Refuse what is no TLS by its first bytes, unless there is somebody else for it."""
        return FirstBytes(refuse_what_is_not_tls) if self._fallback is None else None

    @property
    def handshakes(self) -> int:
        """How many handshakes are under way."""
        return self._limit.live

    def __call__(self, inner: Service[TlsStream, Output], /) -> Service[Stream, Output]:
        async def terminate(stream: Stream, /) -> Output:
            try:
                tls = await self._accept(stream)
            except AlertError as error:
                if self._fallback is not None and isinstance(error, NotTls):
                    answer: Output = await self._fallback(stream)
                    return answer
                await stream.close_after(error.wire)
                raise
            except ShareExceeded:
                await stream.close_after(Alert.INTERNAL_ERROR.record)
                raise
            try:
                result = await inner(tls)
            except BaseException:
                tls.abort()
                raise
            await tls.close()
            return result

        return terminate

    async def _accept(self, stream: Stream) -> TlsStream:
        try:
            async with self._limit.hold(stream):
                async with asyncio.timeout(self._timeout):
                    hello = await peek_client_hello(stream, timeout=None)
                    add_client_hello(stream, hello)
                    if self._policy is not None:
                        await self._policy.check(stream)
                    context = await self._certificates(hello)
                    return await TlsStream.accept(
                        stream,
                        context,
                        server_name=hello.server_name,
                        timeout=None,
                        ragged_eof=self._ragged_eof,
                    )
        except TimeoutError as error:
            raise HandshakeTimeout(f"TLS handshake not finished within {self._timeout} s") from error

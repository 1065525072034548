"""TLS over any :class:`~rama_ebpf.core.stream.Stream`: OpenSSL works on memory, the transport does all the I/O.

Everything that the transport has read ahead is used, so a stream can be peeked before it is wrapped, and TLS can run
inside TLS. The handshake and each record's cryptography run on the event loop: with a P-256 certificate a handshake
costs about half a millisecond of CPU, and 16 KiB of data about ten microseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from dataclasses import dataclass
from typing import Final

from ...core.address import SocketAddress
from ...core.errors import HandshakeTimeout, LimitExceeded, PeerClosed
from ...core.stream import Stream
from .errors import CertificateRejected, HandshakeFailed, TlsError, TlsTruncated

__all__ = ["TlsParameters", "TlsStream"]

_RECORD: Final = 16 * 1024
_CIPHERTEXT_READ: Final = 256 * 1024
_WRITE: Final = 128 * 1024
_MAX_REPLY: Final = 16 * 1024
_CLOSE_SECONDS: Final = 5.0
_ALERT_SECONDS: Final = 1.0
_MAX_DISCARD: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TlsParameters:
    """What a handshake agreed on; among the extensions of the stream.

    ``version`` is for example ``"TLSv1.3"``, ``alpn`` the protocol or None, ``server_name`` what the client asked
    for, ``peer_certificate`` the DER form of the certificate that the peer proved to own, ``resumed`` whether an
    earlier session was continued.
    """

    version: str
    cipher: str
    alpn: str | None
    server_name: str | None
    peer_certificate: bytes | None
    resumed: bool


class TlsStream(Stream):
    """The plaintext side of a TLS connection; made by :meth:`accept` and :meth:`connect`.

    It shares the transport's extensions and counts plaintext bytes. :meth:`write_eof` sends close_notify and
    reading goes on, in TLS 1.2 too. An EOF of the transport without the peer's close_notify raises
    :class:`TlsTruncated`, unless ``ragged_eof`` says that peers may end like that. What breaks the protocol is answered
    with an alert, and raises :class:`TlsError`; the transport has been closed then.
    """

    def __init__(self, transport: Stream, context: ssl.SSLContext, *, server_name: str | None, server: bool) -> None:
        super().__init__(transport.extensions)
        self._transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server, server_hostname=None if server else server_name
        )
        self._server_name = server_name
        self._ragged_eof = False
        self._flushing = asyncio.Lock()
        self._reply: asyncio.Task[None] | None = None
        self._eof_received = False
        self._eof_sent = False
        self._closed = False
        self._broken = False

    @classmethod
    async def accept(
        cls,
        transport: Stream,
        context: ssl.SSLContext,
        *,
        server_name: str | None = None,
        timeout: float | None = 10.0,
        ragged_eof: bool = False,
    ) -> TlsStream:
        """Do the server's handshake on ``transport`` within ``timeout`` seconds; with None the caller keeps the time.

        ``server_name`` is what the client's hello named, for the record only: ``context`` was chosen by it.
        Raises :class:`HandshakeFailed` after the alert has been sent, :class:`HandshakeTimeout`, or
        :class:`PeerClosed`; the transport is the caller's to abort.
        """
        stream = cls(transport, context, server_name=server_name, server=True)
        await stream._handshake(timeout)
        stream._ragged_eof = ragged_eof
        return stream

    @classmethod
    async def connect(
        cls,
        transport: Stream,
        context: ssl.SSLContext,
        *,
        server_name: str | None,
        timeout: float = 10.0,
        ragged_eof: bool = False,
    ) -> TlsStream:
        """Do the client's handshake. ``server_name`` is sent as SNI, unless it is an IP address, and verified.

        Raises as :meth:`accept` does, and :class:`CertificateRejected`.
        """
        try:
            stream = cls(transport, context, server_name=server_name, server=False)
        except ValueError as error:
            raise HandshakeFailed(f"cannot ask for server name {server_name!r}: {error}") from error
        await stream._handshake(timeout)
        stream._ragged_eof = ragged_eof
        return stream

    @property
    def parameters(self) -> TlsParameters:
        """What the handshake agreed on."""
        cipher = self._tls.cipher()
        return TlsParameters(
            version=self._tls.version() or "",
            cipher=cipher[0] if cipher else "",
            alpn=self._tls.selected_alpn_protocol(),
            server_name=self._server_name,
            peer_certificate=self._tls.getpeercert(binary_form=True),
            resumed=bool(self._tls.session_reused),
        )

    @property
    def transport(self) -> Stream:
        """The stream below, for its options and counters. Reading or writing it breaks the TLS connection."""
        return self._transport

    @property
    def peer(self) -> SocketAddress | None:
        return self._transport.peer

    @property
    def local(self) -> SocketAddress | None:
        return self._transport.local

    def quiet(self) -> bool:
        waiting = self._unread or self._incoming.pending or self._tls.pending()
        return not (self._closed or self._eof_received or waiting) and self._transport.quiet()

    async def reset_by_peer(self) -> None:
        await self._transport.reset_by_peer()

    # -- handshake ---------------------------------------------------------------------------------------------

    async def _handshake(self, timeout: float | None) -> None:
        try:
            if timeout is None:
                await self._shake_hands()
            else:
                async with asyncio.timeout(timeout):
                    await self._shake_hands()
        except TimeoutError as error:
            if timeout is None:
                raise
            raise HandshakeTimeout(f"TLS handshake not finished within {timeout} s") from error
        except ssl.SSLCertVerificationError as error:
            await self._transport.close_after(self._outgoing.read())
            raise CertificateRejected(
                f"certificate of {self._server_name or 'the client'} rejected: {error.verify_message}",
                error.reason or "",
            ) from error
        except ssl.SSLError as error:
            await self._transport.close_after(self._outgoing.read())
            raise HandshakeFailed(f"TLS handshake failed: {_reason(error)}", error.reason or "") from error
        self.extensions.add(self.parameters)

    async def _shake_hands(self) -> None:
        if self._tls.server_side:
            await self._fetch_hello()
        while not self._handshake_step():
            await self._flush()
            await self._fetch_hello()
        await self._flush()

    async def _fetch_hello(self) -> None:
        """Read what the peer says next in its handshake. A server's first word is an answer, so it reads first."""
        if not await self._fetch():
            raise PeerClosed("peer closed during the TLS handshake")

    def _handshake_step(self) -> bool:
        """Go on as far as possible; return False if more from the peer is wanted first."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    # -- reading -----------------------------------------------------------------------------------------------

    async def _receive(self, max_bytes: int) -> bytes:
        while not self._eof_received:
            try:
                data = self._decrypt(max_bytes)
            except TlsError:
                await self._end_broken()
                raise
            if self._outgoing.pending:
                self._reply_soon()
            if data:
                self.bytes_received += len(data)
                return data
            if not self._eof_received and not await self._fetch():
                if not self._ragged_eof:
                    raise TlsTruncated("peer closed its transport without close_notify")
                self._eof_received = True
        return b""

    def _decrypt(self, max_bytes: int) -> bytes:
        """Return what OpenSSL can decrypt now, b"" if it wants more or the peer has ended its side."""
        parts = []
        try:
            while max_bytes > 0:
                data = self._tls.read(min(max_bytes, _RECORD))
                if not data:
                    self._eof_received = True
                    break
                parts.append(data)
                max_bytes -= len(data)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._eof_received = True
        except ssl.SSLError as error:
            # What was decrypted before is good; the error comes back with the next call.
            if not parts:
                self._broken = True
                raise TlsError(f"TLS stream broken: {_reason(error)}") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _end_broken(self) -> None:
        """Tell the peer what was wrong with what it sent, as OpenSSL says it, and close so that it learns it: a reset
        could overtake the alert (RFC 8446 section 6.2; RFC 1122 section 4.2.2.13)."""
        self._broken = True
        with contextlib.suppress(OSError):  # TimeoutError, too: the peer takes nothing, or has gone
            async with asyncio.timeout(_ALERT_SECONDS):
                await self._flush()
        await self._transport.close_after(timeout=_ALERT_SECONDS, max_discard=_MAX_DISCARD)

    async def _fetch(self) -> bool:
        """Give OpenSSL the next bytes of the transport; return False at its EOF."""
        data = await self._transport.read(_CIPHERTEXT_READ)
        self._incoming.write(data)
        return bool(data)

    def _reply_soon(self) -> None:
        """Send what reading has produced without making the reader wait until the peer reads.

        These are alerts: a TLS 1.2 client that wants to renegotiate is refused with one each time. A peer that
        provokes them and does not take them is cut at a bound.
        """
        if not self._flushing.locked() and (self._reply is None or self._reply.done()):
            self._reply = asyncio.get_running_loop().create_task(self._flush_reply())
        elif self._outgoing.pending > _MAX_REPLY:
            # What a writer waits to get rid of is not in here any more: these are all replies.
            raise LimitExceeded(f"peer asked for {self._outgoing.pending} bytes of TLS replies and does not take them")

    async def _flush_reply(self) -> None:
        # A transport that has failed says so to the next read or write as well.
        with contextlib.suppress(OSError):
            await self._flush()

    # -- writing -----------------------------------------------------------------------------------------------

    async def write(self, *chunks: bytes | bytearray | memoryview) -> None:
        self._check_writable()
        views = [memoryview(chunk).cast("B") for chunk in chunks if len(chunk)]
        if len(views) > 1 and sum(map(len, views)) <= _RECORD:
            views = [memoryview(b"".join(views))]  # one record instead of several
        for view in views:
            while view:
                try:
                    # A memory BIO takes whatever it is given: the portion is what bounds the memory.
                    taken = self._tls.write(view[:_WRITE])
                except ssl.SSLError as error:
                    await self._end_broken()
                    raise TlsError(f"TLS stream broken: {_reason(error)}") from error
                self.bytes_sent += taken
                view = view[taken:]
                await self._flush()
                self._check_writable()

    async def write_eof(self) -> None:
        if self._eof_sent or self._closed:
            return
        if self._broken:
            raise ConnectionAbortedError("TLS stream broken")
        self._send_close_notify()
        await self._flush()

    def _send_close_notify(self) -> None:
        """Queue close_notify and leave reading as it was.

        ``unwrap`` does not only send: it goes on to read the peer's close_notify and fails for good when it meets
        data. So it is given nothing to read.
        """
        self._eof_sent = True
        try:
            while waiting := self._tls.pending():
                self._unread += self._tls.read(waiting)
            held = self._incoming.read()
            try:
                self._tls.unwrap()
            except ssl.SSLWantReadError:
                pass  # sent; the peer's own is still to come
            finally:
                self._incoming.write(held)
        except ssl.SSLError as error:
            self._broken = True
            raise TlsError(f"cannot send close_notify: {_reason(error)}") from error

    async def _flush(self) -> None:
        if not self._outgoing.pending:
            return
        rest: memoryview | bytes = b""
        if not self._flushing.locked():
            # Nobody waits before us, and the transport nearly always takes it whole.
            data = self._outgoing.read()
            try:
                sent = self._transport.write_now(data)
            except BaseException:
                self._broken = True
                raise
            if sent == len(data):
                return
            rest = memoryview(data)[sent:]
        async with self._flushing:
            while rest or self._outgoing.pending:
                try:
                    await self._transport.write(rest or self._outgoing.read())
                    rest = b""
                except BaseException:
                    self._broken = True  # part of a record may be gone: nothing sent after it would be understood
                    raise

    def _check_writable(self) -> None:
        if self._closed or self._broken:
            raise ConnectionAbortedError("TLS stream closed")
        if self._eof_sent:
            raise BrokenPipeError("write after write_eof")

    # -- closing -----------------------------------------------------------------------------------------------

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                if not self._eof_sent and not self._broken:
                    self._send_close_notify()
                    await self._flush()
                if self._reply is not None:
                    await self._reply
        except OSError:
            # The peer has gone, does not read, or broke the stream: there is no orderly end left to make.
            self._transport.abort()
        finally:
            self._stop_reply()
            await self._transport.close()

    def abort(self) -> None:
        self._closed = True
        self._stop_reply()
        self._transport.abort()

    def _stop_reply(self) -> None:
        if self._reply is not None:
            self._reply.cancel()


def _reason(error: ssl.SSLError) -> str:
    """OpenSSL's words without the source position that Python appends."""
    return (error.reason or str(error)).lower().replace("_", " ")

"""Writing HTTP/1.1 messages (RFC 9112): one at a time, with the framing that their length asks for. Sans-I/O.

Names and values of fields were checked when they were put into :class:`~..message.headers.Headers`; what comes from
elsewhere, a target, a reason, a host, is checked here, so that nothing can split a message. A body that is longer or
shorter than its message says raises :class:`WrongLength`: whoever reads it would take what follows for the rest, or
wait for ever."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Final

from ..message.errors import REASONS
from ..message.fields import members
from ..message.headers import Headers, Written

__all__ = ["NOT_A_REQUESTS", "NOT_A_RESPONSES", "MessageWriter", "WrongLength"]

_CHUNKED: Final = -1
_TILL_CLOSE: Final = -2

_TARGET: Final = re.compile(r"[!-~]+")
_METHOD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_REASON: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")

# Fields that are the connection's own: a service's values would contradict what is sent.
NOT_A_RESPONSES: Final = frozenset(
    {b"connection", b"content-length", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
"""Names, in lower case, of fields that a connection writes itself into responses."""
NOT_A_REQUESTS: Final = NOT_A_RESPONSES | {b"host", b"te", b"expect"}
"""The same for requests."""
_PLAIN_METHODS: Final = {"GET": b"GET", "HEAD": b"HEAD"}
_SAYS_LENGTH_ZERO: Final = frozenset({"POST", "PUT", "PATCH"})


class WrongLength(ValueError):
    """A body is not as long as its message has said."""


class MessageWriter:
    """Writes the messages of one side of a connection. ``begun`` says that a final response (a request) has begun,
    ``over`` that it is complete, ``last`` that nothing may follow it. Behind a complete message both are made false."""

    __slots__ = ("_left", "begun", "last", "over")

    def __init__(self) -> None:
        self.begun = self.over = self.last = False
        self._left = 0

    def request(
        self,
        method: str,
        target: str,
        host: str,
        headers: Headers,
        extra: list[bytes],
        length: int | None,
        *,
        expect: bool = False,
    ) -> bytes:
        """Return a request's header section. ``extra`` are field lines that are the connection's own, ``length`` is
        that of the body, None if it is not known; ``expect`` asks for 100 (Continue). Raises ValueError for a method or
        target that is none."""
        if _METHOD.fullmatch(method) is None or _TARGET.fullmatch(target) is None:
            raise ValueError("a method or target that cannot be sent")
        if host and _TARGET.fullmatch(host) is None:
            raise ValueError("a host that cannot be sent")
        lines = [b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (method.encode(), target.encode(), host.encode())]
        lines += _lines(headers, NOT_A_REQUESTS)
        lines += extra
        if length is None:
            lines.append(b"Transfer-Encoding: chunked\r\n")
            self._left = _CHUNKED
        else:
            if length or method in _SAYS_LENGTH_ZERO:
                lines.append(b"Content-Length: %d\r\n" % length)
            self._left = length
        if expect and length != 0:
            lines.append(b"Expect: 100-continue\r\n")
        lines.append(b"\r\n")
        self.begun = True
        return b"".join(lines)

    def plain_request(
        self, method: str, target: str, host: str, lines: bytes, extra: bytes, content: bytes = b""
    ) -> bytes:
        """Return a request with its ``content``, complete. ``lines`` are those of its fields without
        :data:`NOT_A_REQUESTS`, ``extra`` the connection's own but its length. Raises ValueError as :meth:`request`."""
        if not target or _TARGET.fullmatch(target + host) is None:
            raise ValueError("a target or host that cannot be sent")
        known = _PLAIN_METHODS.get(method)
        if known is None:
            if _METHOD.fullmatch(method) is None:
                raise ValueError("a method that cannot be sent")
            known = method.encode()
        if content or method in _SAYS_LENGTH_ZERO:
            extra += b"Content-Length: %d\r\n" % len(content)
        self.begun = self.over = True
        return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%b\r\n%b" % (
            known,
            target.encode(),
            host.encode(),
            lines,
            extra,
            content,
        )

    def interim(self, status: int, headers: Headers) -> bytes:
        """Return a 1xx response."""
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, _reason(status, "")), *_lines(headers, NOT_A_RESPONSES), b"\r\n"]
        return b"".join(lines)

    def response(
        self,
        status: int,
        reason: str,
        headers: Headers,
        extra: list[bytes],
        length: int | None,
        *,
        bodiless: bool,
        http_1_0: bool,
        close: bool,
        date: Callable[[], str] | None = None,
    ) -> bytes:
        """Return a final response's header section. ``extra`` are field lines that are the connection's own.
        ``length`` is that of the body, or what a ``bodiless`` one (HEAD, 304) would have; None if it is not known:
        then it is chunked, or to a client of ``http_1_0`` ends with the connection. It ends with it also where
        ``headers`` say so. ``date`` returns the Date field of a response that has none."""
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, _reason(status, reason))]
        for key, _, value, line in headers._items:
            if key not in NOT_A_RESPONSES:
                lines.append(line)
                if key == b"date":
                    date = None
            elif key == b"connection" and b"close" in members([value]):
                close = True
        if date is not None:
            # RFC 9110 section 6.6.1: who generates a response with a clock dates it; who forwards one without does.
            lines.append(b"Date: %b\r\n" % date().encode("ascii"))
        if extra:
            lines += extra
        self._left = 0
        if length is not None:
            if status != 204:
                lines.append(b"Content-Length: %d\r\n" % length)
            if not bodiless:
                self._left = length
        elif bodiless:
            pass
        elif http_1_0:
            self._left = _TILL_CLOSE
            close = True
        else:
            lines.append(b"Transfer-Encoding: chunked\r\n")
            self._left = _CHUNKED
        if close:
            self.last = True
            lines.append(b"Connection: close\r\n")
        lines.append(b"\r\n")
        self.begun = True
        return b"".join(lines)

    def plain_response(
        self, status: int, reason: str, written: Written, content: bytes, *, close: bool, date: Callable[[], str]
    ) -> bytes:
        """Return a final response with its content, complete: one that has a length, and is none to HEAD. ``written``
        are its fields without :data:`NOT_A_RESPONSES`; ``date`` as in :meth:`response`."""
        self.begun = self.over = True
        if close:
            self.last = True
        return b"%b%b%bContent-Length: %d\r\n%b%b" % (
            _status_line(status, reason),
            written.lines,
            b"" if written.dated else b"Date: %b\r\n" % date().encode("ascii"),
            len(content),
            b"Connection: close\r\n\r\n" if close else b"\r\n",
            content,
        )

    def switch(self, status: int, reason: str, headers: Headers, extra: list[bytes]) -> bytes:
        """Return the response behind which another protocol is spoken."""
        self.begun = self.over = self.last = True
        lines = [
            b"HTTP/1.1 %d %b\r\n" % (status, _reason(status, reason)),
            *_lines(headers, NOT_A_RESPONSES),
            *extra,
            b"\r\n",
        ]
        return b"".join(lines)

    def content(self, data: bytes) -> bytes:
        """Return some bytes of the body (not b"") as they are sent. Raises :class:`WrongLength`."""
        left = self._left
        if left >= 0:
            if len(data) > left:
                raise WrongLength("a body is longer than its message said")
            self._left = left - len(data)
            return data
        return data if left == _TILL_CLOSE else b"%x\r\n%b\r\n" % (len(data), data)

    def skip(self, count: int) -> None:
        """``count`` bytes of a body whose length is known go past this object. Raises :class:`WrongLength`."""
        if count > self._left:
            raise WrongLength("a body is longer than its message said")
        self._left -= count

    def end(self, trailers: Headers | None) -> bytes:
        """Return what ends the message; ``trailers`` only where it is chunked. Raises :class:`WrongLength`."""
        if self._left > 0:
            raise WrongLength("a body is shorter than its message said")
        self.over = True
        if self._left != _CHUNKED:
            return b""
        return b"0\r\n\r\n" if trailers is None else b"".join([b"0\r\n", *_lines(trailers, frozenset()), b"\r\n"])


def _lines(headers: Headers, own: frozenset[bytes]) -> list[bytes]:
    return [field[3] for field in headers._items if field[0] not in own]


@functools.lru_cache(256)
def _status_line(status: int, reason: str) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, _reason(status, reason))


@functools.lru_cache(256)
def _reason(status: int, reason: str) -> bytes:
    text = (reason or REASONS.get(status, "")).encode("latin-1")
    if _REASON.fullmatch(text) is None:
        raise ValueError("a reason phrase that cannot be sent")
    return text

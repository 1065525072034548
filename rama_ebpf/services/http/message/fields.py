"""Header fields of any version of HTTP: which names and values may be, and what must not stand where (RFC 9110)."""

from __future__ import annotations

import re
from typing import Final

from .errors import AmbiguousMessage, MalformedMessage
from .limits import HttpLimits

__all__ = [
    "TOKEN",
    "Field",
    "check_field",
    "check_field_count",
    "check_lookalike",
    "check_trailers",
    "content_length",
    "field_of",
    "is_token",
    "members",
]

Field = tuple[bytes, bytes, bytes, bytes]
"""Name in lower case, name as it was spelt, value, and the line that HTTP/1.1 writes of them."""

TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
"""One character of a token (RFC 9110 section 5.6.2), as a regular expression."""

_TOKENS: Final = re.compile(TOKEN + rb"+")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_LENGTH: Final = re.compile(rb"0{0,64}[0-9]{1,18}")

# CGI and many frameworks read "_" as "-": these names must not come in through that door.
_PROTECTED: Final = frozenset(
    {
        b"connection",
        b"content-length",
        b"forwarded",
        b"host",
        b"proxy-authorization",
        b"transfer-encoding",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-real-ip",
    }
)

# What frames, routes, authenticates or changes how the content is read has no place in a trailer (RFC 9110, 6.5.1).
_NOT_IN_TRAILERS: Final = frozenset(
    {
        b"authorization",
        b"cache-control",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"expect",
        b"forwarded",
        b"host",
        b"keep-alive",
        b"max-forwards",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"set-cookie",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"via",
        b"x-forwarded-for",
    }
)


def field_of(lowered: bytes, name: bytes, value: bytes) -> Field:
    """Return a field whose name and value were checked."""
    return lowered, name, value, b"%b: %b\r\n" % (name, value)


def is_token(text: bytes) -> bool:
    """Whether ``text`` is a token (RFC 9110 section 5.6.2)."""
    return _TOKENS.fullmatch(text) is not None


def check_trailers(fields: list[Field]) -> None:
    """Raise :class:`MalformedMessage` if one of the fields is none for a trailer."""
    for field in fields:
        if field[0] in _NOT_IN_TRAILERS:
            raise AmbiguousMessage("a field that must not stand in a trailer section")


def check_field_count(count: int, size: int, limits: HttpLimits) -> None:
    """Raise :class:`MalformedMessage` with 431 for more fields, or bytes of them, than ``limits`` allow."""
    if count > limits.fields:
        raise MalformedMessage("too many header fields", 431)
    if size > limits.head:
        raise MalformedMessage("header section too large", 431)


def check_field(name: bytes, value: bytes) -> None:
    """Raise :class:`MalformedMessage` unless a field that came without delimiters (HTTP/2) is one in HTTP/1.1."""
    if _TOKENS.fullmatch(name) is None:
        raise MalformedMessage("a header name that is not a token")
    if _VALUE.fullmatch(value) is None or value.strip(b" \t") != value:
        raise MalformedMessage("a header value with a control character, or a blank at an end")
    check_lookalike(name)


def check_lookalike(lowered: bytes) -> None:
    """Raise :class:`MalformedMessage` for a name that CGI and others take for one of weight."""
    if b"_" in lowered and lowered.replace(b"_", b"-") in _PROTECTED:
        raise MalformedMessage("a header name that can be taken for another")


def members(values: list[bytes]) -> list[bytes]:
    """Return the members of a list field (RFC 9110 section 5.6.1), in lower case."""
    found = [member.strip(b" \t").lower() for value in values for member in value.split(b",")]
    return [member for member in found if member]


def content_length(values: list[bytes]) -> int | None:
    """Return what the Content-Length fields of a message say, None if there is none. Raises
    :class:`MalformedMessage` if it is not exactly one plain number; zeros in front of one are legal."""
    if not values:
        return None
    if len(values) > 1:
        raise AmbiguousMessage("more than one Content-Length")
    if _LENGTH.fullmatch(values[0]) is None:
        raise MalformedMessage("Content-Length is not one plain decimal number")
    return int(values[0])

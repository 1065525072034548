"""Fields of one connection, which go no further (RFC 9110 section 7.6.1), and those that Connection nominates."""

from __future__ import annotations

from typing import Final

from .errors import AmbiguousMessage, MalformedMessage
from .fields import Field, is_token, members

__all__ = ["HOP_BY_HOP", "end_to_end", "nominated_by"]

# Fields of one connection, whatever Connection says (RFC 9110 section 7.6.1, RFC 9113 section 8.2.2), and what
# an attribute stands for. Proxy-Authorization is for us: the auth layer reads it and the proxy removes it.
HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"http2-settings",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NOT_TO_NOMINATE: Final = frozenset({b"content-length", b"host", b"transfer-encoding"})


_USUAL_OPTIONS: Final = frozenset({b"close", b"keep-alive"})


def nominated_by(values: list[bytes]) -> list[bytes]:
    """Return the options of Connection, in lower case (RFC 9110 section 7.6.1)."""
    options = members(values)
    for option in options:
        if option in _USUAL_OPTIONS:
            continue
        if not is_token(option):
            raise MalformedMessage("a Connection option that is not a token")
        if option in _NOT_TO_NOMINATE:
            raise AmbiguousMessage("Connection names a field that frames or routes the message")
    return options


def end_to_end(fields: list[Field], nominated: list[bytes]) -> list[Field]:
    """Return the fields that Connection does not nominate. Proxy-Authorization stays: it is for us."""
    if not _USUAL_OPTIONS.issuperset(nominated):
        fields = [field for field in fields if field[0] not in nominated or field[0] == b"proxy-authorization"]
    elif nominated:
        fields = [field for field in fields if field[0] not in _USUAL_OPTIONS]
    return fields

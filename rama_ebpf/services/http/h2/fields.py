"""Translation of HTTP/2 fields, in and out, that cannot smuggle (RFC 9113 section 8).

HTTP/2 has no delimiters, so a field may hold any octet; what would become a delimiter, a second field or a second
message in HTTP/1.1 is refused here, with the same rules as in :mod:`..message.fields`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ..message.errors import MalformedMessage
from ..message.fields import Field, check_field, check_field_count, check_trailers, content_length, field_of
from ..message.headers import Headers
from ..message.limits import HttpLimits
from ..message.model import Request, Response
from ..message.uri import TargetForm, parse_authority, parse_target

__all__ = [
    "Fields",
    "H2RequestHead",
    "H2ResponseHead",
    "read_request",
    "read_response",
    "read_trailers",
    "request_fields",
    "response_fields",
    "trailer_fields",
]

Fields = list[tuple[bytes, bytes]]

_METHOD: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_STATUS: Final = re.compile(rb"[1-9][0-9]{2}")
_LAST_STATUS: Final = 599
_PSEUDO_REQUEST: Final = frozenset({b":method", b":scheme", b":authority", b":path", b":protocol"})
_CONNECTION_SPECIFIC: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"http2-settings"}
)
_NOT_FORWARDED: Final = frozenset({b"content-length", b"expect", b"host", b"te"})
_NOT_SENT: Final = frozenset(
    {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "te", "host", "content-length"}
)


@dataclass(frozen=True, slots=True)
class H2RequestHead:
    """What a request's header block says. ``length`` is None if it is not declared."""

    method: str
    scheme: str
    authority: str
    path: str
    protocol: str | None
    headers: Headers
    length: int | None
    expects_continue: bool
    accepts_trailers: bool


@dataclass(frozen=True, slots=True)
class H2ResponseHead:
    """What a response's header block says."""

    status: int
    headers: Headers
    length: int | None


def read_request(fields: Fields, limits: HttpLimits) -> H2RequestHead:
    """Read a request's header block. Raises :class:`MalformedMessage`."""
    pseudo, regular = _split(fields, _PSEUDO_REQUEST, limits)
    if len(pseudo.get(b":path", b"")) > limits.target:
        raise MalformedMessage("request target too long", 414)
    raw_method = pseudo.get(b":method", b"")
    if _METHOD.fullmatch(raw_method) is None:
        raise MalformedMessage("bad :method")
    method = raw_method.decode("ascii")
    if method != method.upper():
        raise MalformedMessage("a :method in lower case")
    authority = _authority(pseudo, regular)
    protocol = pseudo.get(b":protocol")
    if protocol is not None and (method != "CONNECT" or _METHOD.fullmatch(protocol) is None):
        raise MalformedMessage("bad :protocol")
    if method == "CONNECT" and protocol is None:
        if b":path" in pseudo or b":scheme" in pseudo:
            raise MalformedMessage("CONNECT with a :path or :scheme")
        scheme, path = "", ""
        _port_required(pseudo.get(b":authority", b"").decode("latin-1"))
    else:
        scheme = pseudo.get(b":scheme", b"").decode("latin-1")
        if scheme not in ("http", "https"):
            raise MalformedMessage("bad :scheme")
        path = _path(method, pseudo.get(b":path", b""))
    length = content_length([value for key, _, value, _ in regular if key == b"content-length"])
    if method in ("CONNECT", "TRACE") and length:
        raise MalformedMessage(f"a body in a {method} request")
    expectations = [value.lower() for key, _, value, _ in regular if key == b"expect"]
    if expectations and expectations != [b"100-continue"]:
        raise MalformedMessage("an expectation other than 100-continue", 417)
    codings = [value.lower() for key, _, value, _ in regular if key == b"te"]
    if codings and codings != [b"trailers"]:
        raise MalformedMessage("a TE other than trailers")
    return H2RequestHead(
        method,
        scheme,
        authority,
        path,
        None if protocol is None else protocol.decode("ascii").lower(),
        _end_to_end(regular),
        length,
        bool(expectations),
        bool(codings),
    )


def read_response(fields: Fields, limits: HttpLimits) -> H2ResponseHead:
    """Read a response's header block, of an interim one too. Raises :class:`MalformedMessage`."""
    pseudo, regular = _split(fields, frozenset({b":status"}), limits)
    raw_status = pseudo.get(b":status", b"")
    if _STATUS.fullmatch(raw_status) is None or raw_status == b"101":
        raise MalformedMessage("bad :status")
    status = int(raw_status)
    if status > _LAST_STATUS:
        status = 502  # as in HTTP/1.1: RFC 9110 section 15
    length = content_length([value for key, _, value, _ in regular if key == b"content-length"])
    if (status < 200 or status == 204) and length:
        raise MalformedMessage(f"a body in a {status} response")
    return H2ResponseHead(status, _end_to_end(regular), length)


def read_trailers(fields: Fields, limits: HttpLimits) -> Headers:
    """Read a trailer section. Raises :class:`MalformedMessage`."""
    _, regular = _split(fields, frozenset(), limits)
    check_trailers(regular)
    return Headers._of_fields(regular)


def _split(fields: Fields, known: frozenset[bytes], limits: HttpLimits) -> tuple[dict[bytes, bytes], list[Field]]:
    check_field_count(len(fields), sum(len(name) + len(value) + 4 for name, value in fields), limits)
    pseudo: dict[bytes, bytes] = {}
    regular: list[Field] = []
    cookies: list[bytes] = []
    for name, value in fields:
        if name.startswith(b":"):
            if name not in known or name in pseudo or regular or cookies:
                raise MalformedMessage("a pseudo-header field that is unknown, repeated or out of place")
            pseudo[name] = value
            continue
        if name != name.lower() or name in _CONNECTION_SPECIFIC:
            raise MalformedMessage("a field that HTTP/2 does not have")
        check_field(name, value)
        if name == b"cookie":
            cookies.append(value)
        else:
            regular.append(field_of(name, name, value))
    if cookies:
        # RFC 9113 section 8.2.3: crumbs are joined before they meet anything that is not HTTP/2.
        regular.append(field_of(b"cookie", b"cookie", b"; ".join(crumb for crumb in cookies if crumb)))
    return pseudo, regular


def _authority(pseudo: dict[bytes, bytes], regular: list[Field]) -> str:
    hosts = [value for key, _, value, _ in regular if key == b"host"]
    authority = pseudo.get(b":authority", hosts[0] if hosts else b"")
    if len(hosts) > 1 or (hosts and hosts[0].lower() != authority.lower()):
        raise MalformedMessage("Host contradicts :authority")
    try:
        text = authority.decode("ascii")
        parse_authority(text, 0)
    except ValueError as error:
        raise MalformedMessage("bad :authority") from error
    return text.removesuffix(":")


def _port_required(authority: str) -> None:
    try:
        parse_authority(authority)
    except ValueError as error:
        raise MalformedMessage("CONNECT without a port") from error


def _path(method: str, path: bytes) -> str:
    try:
        target = parse_target("GET" if method == "CONNECT" else method, path.decode("ascii"))
    except ValueError as error:
        raise MalformedMessage("bad :path") from error
    if target.form not in (TargetForm.ORIGIN, TargetForm.ASTERISK):
        raise MalformedMessage("bad :path")
    return target.path


def _end_to_end(regular: list[Field]) -> Headers:
    return Headers._of_fields([field for field in regular if field[0] not in _NOT_FORWARDED])


# -- out -------------------------------------------------------------------------------------------------------


def request_fields(request: Request, scheme: str) -> Fields:
    """Return the header block of a request: of CONNECT, or of RFC 8441 for one that asks for an upgrade. ``scheme`` is
    that of the connection on which it goes."""
    authority = request.authority.encode("ascii")
    if request.method == "CONNECT":
        fields: Fields = [(b":method", b"CONNECT"), (b":authority", authority)]
    else:
        method = request.method if request.upgrade is None else "CONNECT"
        fields = [
            (b":method", method.encode("ascii")),
            (b":scheme", scheme.encode("ascii")),
            (b":authority", authority),
            (b":path", request.path.encode("ascii")),
        ]
        if request.upgrade is not None:
            fields.append((b":protocol", request.upgrade.encode("ascii")))
    fields += _sendable(request.headers)
    length = request.body.length
    if length:
        fields.append((b"content-length", str(length).encode()))
    if request.body.expects_continue and length != 0:
        fields.append((b"expect", b"100-continue"))
    if request.accepts_trailers:
        fields.append((b"te", b"trailers"))
    return fields


def response_fields(response: Response, *, length: int | None) -> Fields:
    """Return the header block of a final response; a switch of protocols is 200 (RFC 8441 section 5)."""
    status = 200 if response.status == 101 else response.status
    fields: Fields = [(b":status", str(status).encode()), *_sendable(response.headers)]
    if length is not None and status != 204:
        fields.append((b"content-length", str(length).encode()))
    return fields


def trailer_fields(trailers: Headers) -> Fields:
    """Return a trailer section."""
    return _sendable(trailers)


def _sendable(headers: Headers) -> Fields:
    nominated = set(headers.tokens("connection"))
    return [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in headers
        if name.lower() not in _NOT_SENT and name.lower() not in nominated
    ]

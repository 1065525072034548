"""Header sections of HTTP/1.1 messages, read strictly (RFC 9112): bytes in, a head or MalformedMessage out.

Two parsers can differ on: bare CR or LF, folded lines, blanks around names, control characters, two lengths, a length
beside a transfer coding, a transfer coding in HTTP/1.0, several hosts, a method in lower case, ``Content_Length``. Each
of these ends the message here.
"""

from __future__ import annotations

import functools
import re
from typing import Final, NamedTuple

from ....core.blame import speaks_another_protocol
from ..message.errors import AmbiguousMessage, MalformedMessage
from ..message.fields import (
    TOKEN,
    Field,
    check_field_count,
    check_lookalike,
    content_length,
    field_of,
    is_token,
    members,
)
from ..message.headers import Headers
from ..message.hop_by_hop import HOP_BY_HOP, end_to_end, nominated_by
from ..message.limits import HttpLimits
from ..message.uri import Target, parse_authority, parse_target

__all__ = [
    "RequestHead",
    "RequestMemory",
    "ResponseHead",
    "check_field_section",
    "head_end",
    "parse_request",
    "parse_response",
]

_METHOD_LIKE: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,24} ")
_OTHER_VERSION: Final = re.compile(rb"[^ ]+ [\x21-\x7e]+ HTTP/[0-9.]+")  # a browser writes 1.1
_REQUEST_LINE: Final = re.compile(rb"(" + TOKEN + rb"{1,32}) ([\x21-\x7e]+) HTTP/1\.([01])")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")
_FIELD: Final = re.compile(rb"(" + TOKEN + rb"+):([\t\x20-\x7e\x80-\xff]*)")
_FIELDS: Final = re.compile(rb"(?:" + TOKEN + rb"+:[\t\x20-\x7e\x80-\xff]*\r\n)*")
_NEVER: Final = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_FOLD: Final = re.compile(rb"[ \t]*\r\n[ \t]+")
_BLANKS_BEFORE_COLON: Final = re.compile(rb"^(" + TOKEN + rb"+)[ \t]+:", re.MULTILINE)
_STRAY_BYTES: Final = "a bare CR or LF, or a control character, in the header section"
_LAST_STATUS: Final = 599

_METHODS: Final = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH", b"QUERY", b"PRI"}
)
_METHOD_ROOM: Final = 64  # the longest method, two blanks and the version, with some to spare

# Known codings that may precede chunked (RFC 9112 section 7); we decode none of them.
_CODINGS: Final = frozenset({b"gzip", b"x-gzip", b"deflate", b"compress", b"x-compress"})

_NONE: Final[list[bytes]] = []
_LINE_KEPT: Final = 128
_LINES_KEPT: Final = 4096
_SECRETS: Final = frozenset({b"authorization", b"cookie", b"proxy-authorization", b"set-cookie"})


class RequestHead(NamedTuple):
    """A request's header section. ``length`` is None for a chunked body, 0 for none. ``headers`` holds the
    end-to-end fields (and Proxy-Authorization). ``persistent`` tells that the connection may live on."""

    method: str
    target: Target
    authority: str
    version: str
    headers: Headers
    length: int | None
    expects_continue: bool
    accepts_trailers: bool
    upgrade: str | None
    persistent: bool


class ResponseHead(NamedTuple):
    """A response's header section. ``length`` is None for a body that is chunked or, if ``until_close``, ends with
    the connection. ``declared`` is the Content-Length of a response that has no body (HEAD, 304). ``persistent``
    tells that the connection may live on."""

    status: int
    reason: str
    version: str
    headers: Headers
    length: int | None
    until_close: bool
    declared: int | None
    upgrade: str | None
    persistent: bool


def head_end(data: bytearray, searched: int, limits: HttpLimits, *, request: bool) -> int:
    """Return the length of the header section that ``data`` begins with, 0 if it is not complete yet.

    ``searched`` bytes were seen by an earlier call. Raises :class:`MalformedMessage` as soon as it is certain that
    no header section can come of it. What a complete one holds is for :func:`parse_request` to look at.
    """
    start = max(0, searched - 3)
    found = data.find(b"\r\n\r\n", start)
    end = len(data) if found < 0 else found + 4
    if request:
        _check_request_line_size(data, limits)
    if end > limits.head:
        raise MalformedMessage("header section too large", 431)
    if found >= 0:
        return end
    if _NEVER.search(data, start) is not None:
        raise MalformedMessage("not HTTP") if _is_stray(data) else AmbiguousMessage(_STRAY_BYTES)
    return 0


def _check_request_line_size(data: bytearray, limits: HttpLimits) -> None:
    if b" " not in data[:_METHOD_ROOM] and len(data) >= _METHOD_ROOM:
        raise MalformedMessage("no method")
    room = limits.target + _METHOD_ROOM
    if data.find(b"\r\n", 0, room) < 0 and len(data) >= room:
        raise MalformedMessage("request target too long", 414)


class _Section(NamedTuple):
    """What the header fields of a request say, whatever its method and target are."""

    minor: bytes
    lines: bytes
    headers: Headers
    length: int | None
    host: str | None
    expects_continue: bool
    accepts_trailers: bool
    upgrade: str | None
    persistent: bool


class RequestMemory:
    """What one connection's latest request had behind its first line: the next one often has the same, byte by byte,
    and what is known of that need not be found out again. For this connection only: there may be secrets in it."""

    __slots__ = ("section",)

    def __init__(self) -> None:
        self.section: _Section | None = None


_PREFACE: Final = b"PRI * HTTP/2.0"


def parse_request(data: bytes, limits: HttpLimits, memory: RequestMemory | None = None) -> RequestHead:
    """Read a complete header section. Raises :class:`MalformedMessage`."""
    try:
        return _read_request(data, limits, memory)
    except MalformedMessage as error:
        raise _rather_ambiguous(data, error) from error.__cause__


def _read_request(data: bytes, limits: HttpLimits, memory: RequestMemory | None) -> RequestHead:
    line, _, rest = data.partition(b"\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        if line == _PREFACE:
            raise MalformedMessage("HTTP/2 without TLS is not served here")
        stray = _METHOD_LIKE.match(line) is not None or speaks_another_protocol(line)
        refusal = AmbiguousMessage if not stray or _OTHER_VERSION.fullmatch(line) else MalformedMessage
        raise refusal("not a request line of HTTP/1.0 or HTTP/1.1")
    raw_method, raw_target, minor = match.groups()
    if len(raw_target) > limits.target:
        raise MalformedMessage("request target too long", 414)
    if raw_method not in _METHODS and raw_method.upper() in _METHODS:
        raise MalformedMessage("a method that differs from a known one in case only")
    method = raw_method.decode("ascii")
    try:
        target = parse_target(method, raw_target.decode("ascii"))
    except ValueError as error:
        raise MalformedMessage(f"bad request target: {_reason(error)}") from error
    section = None if memory is None else memory.section
    if section is None or section.lines != rest or section.minor != minor:
        section = _read_section(rest, minor, method, target, limits)
        if memory is not None:
            memory.section = section
    elif section.length != 0:
        _check_bodiless(method, section.length)
    # RFC 9112 section 3.2.2: the target's authority counts, and the Host field is ignored.
    return RequestHead(
        method,
        target,
        target.authority or section.host or "",
        "1.1" if minor == b"1" else "1.0",
        section.headers.copy(),
        section.length,
        section.expects_continue,
        section.accepts_trailers,
        section.upgrade,
        section.persistent,
    )


def _read_section(rest: bytes, minor: bytes, method: str, target: Target, limits: HttpLimits) -> _Section:
    """Read what is behind the request line."""
    version = "1.1" if minor == b"1" else "1.0"
    fields, own = _fields(rest.split(b"\r\n"), 0, len(rest) - 2, limits)
    length = _length(own, version, 0)
    host = _host_of(own.get(b"host"), version)
    _check_bodiless(method, length)
    nominated = nominated_by(own[b"connection"]) if b"connection" in own else _NONE
    return _Section(
        minor,
        rest,
        Headers._of_fields(end_to_end(fields, nominated))._remembering(),
        length,
        host,
        b"expect" in own and _expects_continue(own[b"expect"], version),
        b"te" in nominated and b"trailers" in members(own.get(b"te", _NONE)),
        _upgrade(own, nominated) if version == "1.1" and length == 0 else None,
        version == "1.1" and b"close" not in nominated,
    )


def _check_bodiless(method: str, length: int | None) -> None:
    if length != 0 and method in ("CONNECT", "TRACE"):
        raise MalformedMessage(f"a body in a {method} request")


def parse_response(data: bytes, limits: HttpLimits, *, method: str, lenient: bool = False) -> ResponseHead:
    """Read the complete header section of a response to a request with ``method``. Raises
    :class:`MalformedMessage`.

    ``lenient`` takes what old servers send and what can be read in one way only: folded lines, blanks before a colon
    (RFC 9112 sections 5.1 and 5.2), a length that is told twice alike, a 204 with a length.
    """
    try:
        return _read_response(_unfolded(data) if lenient else data, limits, method, lenient)
    except MalformedMessage as error:
        raise _rather_ambiguous(data, error) from error.__cause__


def _read_response(data: bytes, limits: HttpLimits, method: str, lenient: bool) -> ResponseHead:
    lines = data.split(b"\r\n")
    line = lines[0]
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise MalformedMessage("not a status line of HTTP/1.0 or HTTP/1.1")
    minor, raw_status, reason = match.groups()
    status = int(raw_status)
    if status > _LAST_STATUS:
        # RFC 9110 section 15: whatever it was to say, it is a server's failure. What we send on is a status.
        status, reason = 502, b""
    version = "1.1" if minor == b"1" else "1.0"
    fields, own = _fields(lines, 1, len(data) - len(line) - 4, limits)
    coded = b"transfer-encoding" in own
    length = _length(_collapsed(own) if lenient else own, version, None)
    if (status < 200 and (coded or length)) or (status == 204 and length and not lenient):
        raise MalformedMessage(f"a body in a {status} response")
    nominated = nominated_by(own[b"connection"]) if b"connection" in own else _NONE
    until_close = length is None and not coded
    # RFC 9112 section 6.3: a 204 ends with its header section, chunked or not. What such a server sends next is unsure.
    unsure = status == 204 and (coded or bool(length))
    declared: int | None = None
    if method == "HEAD" or status in (204, 304) or status < 200 or (method == "CONNECT" and status < 300):
        if method == "HEAD" or status == 304:
            declared = length
        length, until_close = 0, False
    return ResponseHead(
        status,
        (reason or b"").decode("latin-1"),
        version,
        Headers._of_fields(end_to_end(fields, nominated))._remembering(),
        length,
        until_close,
        declared,
        _upgrade(own, nominated) if status == 101 else None,
        version == "1.1" and b"close" not in nominated and not until_close and not unsure,
    )


def _rather_ambiguous(data: bytes, error: MalformedMessage) -> MalformedMessage:
    """Bytes that parsers end lines at in different ways say more of a message than what is wrong with it besides."""
    if type(error) is MalformedMessage and _NEVER.search(data) is not None and not _is_stray(data):
        return AmbiguousMessage(_STRAY_BYTES)
    return error


def _is_stray(data: bytes | bytearray) -> bool:
    """Whether it is TLS or STUN, as a link can make a browser send to any port."""
    return data[0] < 0x20 and speaks_another_protocol(bytes(data[:8]))


def _unfolded(data: bytes) -> bytes:
    """Old ways of writing fields, as they are written now."""
    line, _, rest = data.partition(b"\r\n")
    return line + b"\r\n" + _BLANKS_BEFORE_COLON.sub(rb"\1:", _FOLD.sub(b" ", rest))


def _collapsed(own: dict[bytes, list[bytes]]) -> dict[bytes, list[bytes]]:
    """RFC 9110 section 8.6: a length that is told several times, alike, is that length."""
    told = {value.strip(b" \t") for values in own.get(b"content-length", _NONE) for value in values.split(b",")}
    return {**own, b"content-length": [told.pop()]} if len(told) == 1 else own


def _field(line: bytes) -> tuple[Field, bool]:
    """Return name in lower case, name and value, and whether it is a field of one connection."""
    match = _FIELD.fullmatch(line)
    if match is None:
        raise MalformedMessage("a line that is not a header field")
    name, value = match.groups()
    lowered = name.lower()
    check_lookalike(lowered)
    return field_of(lowered, name, value.strip(b" \t")), lowered in HOP_BY_HOP


_lines: Final[dict[bytes, tuple[Field, bool]]] = {}


def _known(line: bytes) -> tuple[Field, bool]:
    """:func:`_field`, to be remembered: most lines come again and again, on one connection and on others. Secrets are
    not kept."""
    found = _field(line)
    if len(line) <= _LINE_KEPT and found[0][0] not in _SECRETS:
        if len(_lines) >= _LINES_KEPT:
            _lines.clear()
        _lines[line] = found
    return found


def _fields(
    lines: list[bytes], first: int, size: int, limits: HttpLimits
) -> tuple[list[Field], dict[bytes, list[bytes]]]:
    """Return the end-to-end fields of a section's lines (from number ``first`` on, the last two are empty), and the
    values of the others by name. Each line is looked at once."""
    count = len(lines) - 2 - first
    if count > limits.fields or size > limits.head:
        check_field_count(count, size, limits)
    del lines[-2:]
    if first:
        del lines[:first]
    fields: list[Field] = []
    own: dict[bytes, list[bytes]] = {}
    remembered = _lines.get
    for line in lines:
        field, is_own = remembered(line) or _known(line)
        if not is_own:
            fields.append(field)
        elif field[0] in own:
            own[field[0]].append(field[2])
        else:
            own[field[0]] = [field[2]]
    return fields, own


def check_field_section(data: bytes, limits: HttpLimits) -> list[Field]:
    """Return name in lower case, name and value of each field of ``data`` (lines with CRLF, no empty line)."""
    if _FIELDS.fullmatch(data) is None:
        raise MalformedMessage("a line that is not a header field")
    lines = data.split(b"\r\n")
    lines.pop()
    check_field_count(len(lines), len(data), limits)
    fields: list[Field] = []
    for line in lines:
        name, _, value = line.partition(b":")
        lowered = name.lower()
        check_lookalike(lowered)
        fields.append(field_of(lowered, name, value.strip(b" \t")))
    return fields


def _reason(error: ValueError) -> str:
    # The messages of ipaddress repeat their input.
    return "bad address" if "ermitted" in str(error) or "xpected" in str(error) else str(error)


def _length(own: dict[bytes, list[bytes]], version: str, default: int | None) -> int | None:
    """Return the body's length, None if it is chunked, ``default`` if no field says (RFC 9112 section 6.3)."""
    lengths = own.get(b"content-length")
    codings = own.get(b"transfer-encoding")
    if codings is not None:
        if lengths is not None:
            raise AmbiguousMessage("Content-Length beside Transfer-Encoding")
        _check_codings(codings, version)
        return None
    return default if lengths is None else content_length(lengths)


def _check_codings(codings: list[bytes], version: str) -> None:
    if version == "1.0":
        raise MalformedMessage("Transfer-Encoding in an HTTP/1.0 message")
    if len(codings) > 1:
        raise AmbiguousMessage("more than one Transfer-Encoding")
    *others, last = [coding.strip(b" \t") for coding in codings[0].lower().split(b",")]
    if last != b"chunked":
        raise AmbiguousMessage("Transfer-Encoding does not end in chunked")
    if others:
        known = all(coding in _CODINGS for coding in others)
        raise MalformedMessage("a transfer coding that is not supported", 501 if known else 400)


def _host_of(hosts: list[bytes] | None, version: str) -> str | None:
    if hosts is None:
        if version == "1.1":
            raise MalformedMessage("no Host")
        return None
    if len(hosts) > 1:
        raise AmbiguousMessage("more than one Host")
    try:
        return _host(hosts[0])
    except ValueError as error:
        raise MalformedMessage("bad Host") from error


@functools.lru_cache(1024)
def _host(value: bytes) -> str:
    # An empty Host is allowed where the target has no authority; nothing could be routed by it.
    text = value.decode("ascii")
    parse_authority(text, 0)
    return text.removesuffix(":")


def _expects_continue(values: list[bytes], version: str) -> bool:
    expectations = members(values)
    if not expectations or version == "1.0":
        return False
    if expectations != [b"100-continue"]:
        raise MalformedMessage("an expectation other than 100-continue", 417)
    return True


def _upgrade(own: dict[bytes, list[bytes]], nominated: list[bytes]) -> str | None:
    if b"upgrade" not in nominated:
        return None
    protocols = members(own.get(b"upgrade", _NONE))
    if len(protocols) != 1 or not is_token(protocols[0]):
        return None
    return protocols[0].decode("ascii")

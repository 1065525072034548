"""What a TLS client says first, parsed without answering it (sans-I/O).

:class:`ClientHelloParser` takes the client's bytes in any portions and returns a :class:`ClientHello` once the
message is complete, however it is split over records and segments. Rules:

- Nothing is consumed: the caller keeps the bytes and hands them to whoever speaks TLS afterwards.
- A byte that no TLS client sends ends the parse at once (:class:`~.errors.NotTls`), so that another protocol on the
  port is told apart after its first bytes and not after a time-out.
- Every length is checked against what encloses it and nothing may be left over, as RFC 8446 section 4 asks; an
  extension may come once. A message that two parsers could read in two ways is refused, for a policy decided here
  must hold for the server behind.
- Memory is bounded by ``limit``, the size of the message with its record headers.
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, TypeVar

from .alert import Alert
from .errors import AlertError, NotTls

__all__ = ["DEFAULT_LIMIT", "GREASE", "ClientHello", "ClientHelloParser"]

DEFAULT_LIMIT: Final = 32 * 1024
"""Default bound of a ClientHello in bytes. Today's largest are about 2 KiB (ML-KEM key shares), or a few KiB where a
session ticket carries a client certificate."""

_HANDSHAKE: Final = 22
_MAX_FRAGMENT: Final = 1 << 14
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")

_EXTENSION: Final = struct.Struct(">HH")

_SERVER_NAME: Final = 0
_SUPPORTED_GROUPS: Final = 10
_EC_POINT_FORMATS: Final = 11
_SIGNATURE_ALGORITHMS: Final = 13
_ALPN: Final = 16
_SUPPORTED_VERSIONS: Final = 43
_KEY_SHARE: Final = 51
_ENCRYPTED_CLIENT_HELLO: Final = 0xFE0D


_KEPT: Final = 256
_MAX_KEPT: Final = 512
"""Bytes of an extension."""

T = TypeVar("T")

GREASE: Final = frozenset(0x0101 * (high << 4 | 0x0A) for high in range(16))
"""The code points of RFC 8701: 0x0A0A, 0x1A1A, … 0xFAFA."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """A ClientHello (RFC 8446 section 4.1.2), every list in the order in which the client sent it, GREASE included.

    ``server_name`` is in lower case without a trailing dot, None if the client named none. With
    ``encrypted_client_hello`` (the outer form, RFC 9849) it is the public name of the provider, not the true target.
    ``length`` is the number of bytes on the wire, record headers included.
    """

    legacy_version: int
    session_id: bytes
    cipher_suites: tuple[int, ...]
    compression_methods: bytes
    extensions: tuple[int, ...]
    server_name: str | None = None
    alpn: tuple[bytes, ...] = ()
    supported_versions: tuple[int, ...] = ()
    supported_groups: tuple[int, ...] = ()
    key_shares: tuple[int, ...] = ()
    point_formats: tuple[int, ...] = ()
    signature_algorithms: tuple[int, ...] = ()
    encrypted_client_hello: bool = False
    length: int = 0

    @property
    def version(self) -> int:
        """The highest version the client offers: 0x0303 is TLS 1.2, 0x0304 is TLS 1.3."""
        return max((v for v in self.supported_versions if v not in GREASE), default=self.legacy_version)


class ClientHelloParser:
    """Reassembles one ClientHello from a byte stream; ``limit`` bounds it in bytes."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._fed = 0
        self._records = 0
        self._header = bytearray()
        self._missing = 0  # bytes of the current record that have not come yet
        self._message = bytearray()

    def feed(self, data: bytes) -> ClientHello | None:
        """Take the next bytes; return the message when it is complete, None while more is needed.

        Bytes past the message are ignored. Raises :class:`NotTls` or :class:`AlertError`; the parser is of no use
        after either, nor after it has returned a message.
        """
        data = data[: self._limit - self._fed]  # so that the outcome does not depend on how the bytes are cut
        at = 0
        while at < len(data):
            if self._missing == 0:
                part = data[at : at + 5 - len(self._header)]
                self._header += part
                self._check_record_header()
            else:
                part = data[at : at + self._missing]
                self._message += part
                self._missing -= len(part)
                needed = self._check_message_header()
                if needed is not None and len(self._message) >= needed:
                    excess = len(self._message) - needed
                    return _parse(bytes(self._message[4:needed]), self._fed + at + len(part) - excess)
            at += len(part)
        self._fed += len(data)
        if self._fed >= self._limit:
            raise AlertError(f"no complete ClientHello within {self._limit} bytes", Alert.RECORD_OVERFLOW)
        return None

    def _check_record_header(self) -> None:
        """Look at what there is of a header, so that a wrong byte shows at once; at its end begin the record."""
        header = self._header
        first = self._records == 0
        if header[0] != _HANDSHAKE:
            if not first:
                raise AlertError(f"record type {header[0]} inside a ClientHello", Alert.UNEXPECTED_MESSAGE)
            # SSL 2.0's header, which clients of its day also used to offer TLS (RFC 5246 appendix E.2).
            if header[0] & 0x80:
                if len(header) < 3:
                    return
                if header[2] == 1:
                    raise AlertError("SSL 2.0 ClientHello", Alert.PROTOCOL_VERSION)
            raise NotTls(f"not TLS: it begins with {bytes(header)!r}")
        if len(header) > 1 and header[1] != 3:
            if first:
                raise NotTls(f"not TLS: it begins with {bytes(header)!r}")
            raise AlertError(f"record version {header[1]}", Alert.PROTOCOL_VERSION)
        if len(header) > 2 and header[2] > 4:
            raise AlertError(f"record version 3.{header[2]}", Alert.PROTOCOL_VERSION)
        if len(header) == 5:
            length = header[3] << 8 | header[4]
            if length == 0:
                raise AlertError("empty handshake record", Alert.UNEXPECTED_MESSAGE)
            if length > _MAX_FRAGMENT:
                raise AlertError(f"record of {length} bytes, at most 16384 are allowed", Alert.RECORD_OVERFLOW)
            self._missing = length
            self._records += 1
            header.clear()

    def _check_message_header(self) -> int | None:
        """Return the length of the message with its header, None if that is not known yet."""
        message = self._message
        if message[0] != 1:
            raise AlertError(f"handshake type {message[0]} where a ClientHello is due", Alert.UNEXPECTED_MESSAGE)
        if len(message) < 4:
            return None
        needed = 4 + int.from_bytes(message[1:4], "big")
        if needed > self._limit:
            raise AlertError(f"ClientHello of {needed} bytes, the limit is {self._limit}", Alert.RECORD_OVERFLOW)
        return needed


class _Reader:
    """Cuts a byte string into the length-prefixed vectors of RFC 8446 section 3.4."""

    __slots__ = ("_at", "_data", "_what")

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._at = 0
        self._what = what

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise AlertError(f"{self._what} is shorter than it says", Alert.DECODE_ERROR)
        return self._data[start : self._at]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "big")

    def vector(self, width: int, *, least: int, most: int | None = None) -> bytes:
        start = self._at + width
        length = int.from_bytes(self._data[self._at : start], "big")
        end = self._at = start + length
        if end > len(self._data):
            raise AlertError(f"{self._what} is shorter than it says", Alert.DECODE_ERROR)
        if length < least or (most is not None and length > most):
            raise AlertError(f"{self._what}: vector of {length} bytes", Alert.DECODE_ERROR)
        return self._data[start:end]

    def numbers(self, width: int) -> tuple[int, ...]:
        """A vector of 16-bit numbers behind a length of ``width`` bytes."""
        data = self.vector(width, least=2)
        if len(data) % 2:
            raise AlertError(f"{self._what}: odd length", Alert.DECODE_ERROR)
        return struct.unpack(f">{len(data) // 2}H", data)

    def end(self) -> None:
        if self:
            raise AlertError(f"{self._what} has bytes left over", Alert.DECODE_ERROR)


def _parse(body: bytes, wire_length: int) -> ClientHello:
    reader = _Reader(body, "ClientHello")
    legacy_version = reader.number(2)
    reader.take(32)  # random
    session_id = reader.vector(1, least=0, most=32)
    cipher_suites = reader.numbers(2)
    compression_methods = reader.vector(1, least=1)
    # Before TLS 1.3 the whole block may be missing (RFC 5246 section 7.4.1.2).
    extensions = _extensions(reader.vector(2, least=0)) if reader else {}
    reader.end()
    ech = extensions.get(_ENCRYPTED_CLIENT_HELLO)
    return ClientHello(
        legacy_version=legacy_version,
        session_id=session_id,
        cipher_suites=cipher_suites,
        compression_methods=compression_methods,
        extensions=tuple(extensions),
        server_name=_remembered(_server_name, extensions.get(_SERVER_NAME)),
        alpn=_remembered(_protocol_names, extensions.get(_ALPN)),
        supported_versions=_remembered(_versions, extensions.get(_SUPPORTED_VERSIONS)),
        supported_groups=_remembered(_groups, extensions.get(_SUPPORTED_GROUPS)),
        key_shares=_key_shares(extensions.get(_KEY_SHARE)),
        point_formats=_remembered(_point_formats, extensions.get(_EC_POINT_FORMATS)),
        signature_algorithms=_remembered(_algorithms, extensions.get(_SIGNATURE_ALGORITHMS)),
        encrypted_client_hello=ech is not None and ech[:1] == b"\0",
        length=wire_length,
    )


def _extensions(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        start = at + 4
        if start > len(data):
            raise AlertError("extensions are shorter than they say", Alert.DECODE_ERROR)
        kind, length = _EXTENSION.unpack_from(data, at)
        at = start + length
        if at > len(data):
            raise AlertError(f"extension {kind} is shorter than it says", Alert.DECODE_ERROR)
        if kind in found:
            raise AlertError(f"extension {kind} twice", Alert.ILLEGAL_PARAMETER)
        found[kind] = data[start:at]
    return found


def _remembered(read: functools._lru_cache_wrapper[T], data: bytes | None) -> T:
    """Read an extension: most clients are of a few kinds, and each kind sends the same bytes every time. What is too
    long to be worth it is read anew, as all is that is refused."""
    return read(data) if data is None or len(data) <= _MAX_KEPT else read.__wrapped__(data)


@functools.lru_cache(_KEPT)
def _versions(data: bytes | None) -> tuple[int, ...]:
    return _numbers(data, "supported_versions", 1)


@functools.lru_cache(_KEPT)
def _groups(data: bytes | None) -> tuple[int, ...]:
    return _numbers(data, "supported_groups", 2)


@functools.lru_cache(_KEPT)
def _algorithms(data: bytes | None) -> tuple[int, ...]:
    return _numbers(data, "signature_algorithms", 2)


def _numbers(data: bytes | None, what: str, width: int) -> tuple[int, ...]:
    if data is None:
        return ()
    reader = _Reader(data, what)
    numbers = reader.numbers(width)
    reader.end()
    return numbers


@functools.lru_cache(_KEPT)
def _point_formats(data: bytes | None) -> tuple[int, ...]:
    if data is None:
        return ()
    reader = _Reader(data, "ec_point_formats")
    formats = reader.vector(1, least=1)
    reader.end()
    return tuple(formats)


def _key_shares(data: bytes | None) -> tuple[int, ...]:
    if data is None:
        return ()
    reader = _Reader(data, "key_share")
    entries = _Reader(reader.vector(2, least=0), "key_share")
    reader.end()
    groups = []
    while entries:
        groups.append(entries.number(2))
        entries.vector(2, least=1)
    return tuple(groups)


@functools.lru_cache(_KEPT)
def _protocol_names(data: bytes | None) -> tuple[bytes, ...]:
    if data is None:
        return ()
    reader = _Reader(data, "ALPN")
    entries = _Reader(reader.vector(2, least=2), "ALPN")
    reader.end()
    names = []
    while entries:
        names.append(entries.vector(1, least=1))
    return tuple(names)


@functools.lru_cache(_KEPT)
def _server_name(data: bytes | None) -> str | None:
    """RFC 6066 section 3: a list with one host name of type 0, a DNS name in ASCII and never an IP address."""
    if data is None:
        return None
    reader = _Reader(data, "server_name")
    entries = _Reader(reader.vector(2, least=1), "server_name")
    reader.end()
    name_type = entries.number(1)
    name = entries.vector(2, least=1)
    if name_type != 0 or entries:
        raise AlertError("server_name must hold one host name", Alert.ILLEGAL_PARAMETER)
    return _host_name(name)


def _host_name(name: bytes) -> str:
    try:
        text = name.decode("ascii").lower().removesuffix(".")
    except UnicodeDecodeError:
        raise AlertError(f"server name {name[:64]!r} is not ASCII", Alert.UNRECOGNIZED_NAME) from None
    labels = text.split(".")
    if len(text) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise AlertError(f"server name {name[:64]!r} is not a host name", Alert.UNRECOGNIZED_NAME)
    # An IPv6 address has no label of letters, digits and hyphens alone, and an IPv4 address ends in a number.
    if labels[-1].isdigit() and _is_address(text):
        raise AlertError(f"server name {text} is an IP address", Alert.UNRECOGNIZED_NAME)
    return text


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True

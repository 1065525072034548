"""Fingerprints of TLS clients: JA3 and JA4, both strings that say which library (and settings) sent a ClientHello.

JA3: Althouse, Atkinson, Atkins, "TLS Fingerprinting with JA3 and JA3S" (Salesforce, 2017).
JA4: FoxIO, ``technical_details/JA4.md`` of FoxIO-LLC/ja4, the part for TLS over TCP.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

from .client_hello import GREASE, ClientHello

__all__ = ["Ja3", "Ja4"]

_SNI: Final = 0x0000
_ALPN: Final = 0x0010
_EMPTY: Final = "000000000000"
_KEPT: Final = 256
_MAX_KEPT_NUMBERS: Final = 256

T = TypeVar("T")
_Numbers = tuple[int, ...]

_JA4_VERSIONS: Final = {0x0304: "13", 0x0303: "12", 0x0302: "11", 0x0301: "10", 0x0300: "s3", 0x0002: "s2"}


@dataclass(frozen=True, slots=True)
class Ja3:
    """``digest`` is the MD5 in hex by which lists name a client, ``raw`` the string it is taken of."""

    digest: str
    raw: str

    @classmethod
    def of(cls, hello: ClientHello) -> Ja3:
        """Compute the fingerprint of ``hello``."""
        return _cached(
            _ja3,
            hello.legacy_version,
            hello.cipher_suites,
            hello.extensions,
            hello.supported_groups,
            hello.point_formats,
        )

    def __str__(self) -> str:
        return self.digest


@dataclass(frozen=True, slots=True)
class Ja4:
    """``value`` is the fingerprint, ``raw`` the form JA4_r with the lists in place of their hashes."""

    value: str
    raw: str

    @classmethod
    def of(cls, hello: ClientHello) -> Ja4:
        """Compute the fingerprint of ``hello`` as received over TCP."""
        return _cached(
            _ja4,
            hello.version,
            hello.cipher_suites,
            hello.extensions,
            hello.signature_algorithms,
            hello.alpn[0] if hello.alpn else b"",
        )

    def __str__(self) -> str:
        return self.value


@functools.lru_cache(maxsize=_KEPT)
def _ja3(version: int, ciphers: _Numbers, extensions: _Numbers, groups: _Numbers, formats: _Numbers) -> Ja3:
    lists = (ciphers, extensions, groups, formats)
    raw = ",".join((str(version), *map(_decimal, lists)))
    return Ja3(hashlib.md5(raw.encode(), usedforsecurity=False).hexdigest(), raw)


@functools.lru_cache(maxsize=_KEPT)
def _ja4(version: int, ciphers: _Numbers, extensions: _Numbers, algorithms: _Numbers, protocol: bytes) -> Ja4:
    ciphers, extensions, algorithms = map(_without_grease, (ciphers, extensions, algorithms))
    head = (
        f"t{_JA4_VERSIONS.get(version, '00')}{'d' if _SNI in extensions else 'i'}"
        f"{min(len(ciphers), 99):02}{min(len(extensions), 99):02}{_alpn_ends(protocol)}"
    )
    cipher_list = _hex(sorted(ciphers))
    extension_list = _hex(sorted(kind for kind in extensions if kind not in (_SNI, _ALPN)))
    if algorithms:
        extension_list += "_" + _hex(algorithms)
    return Ja4(
        f"{head}_{_digest(cipher_list)}_{_digest(extension_list)}",
        f"{head}_{cipher_list}_{extension_list}",
    )


def _cached(compute: functools._lru_cache_wrapper[T], *fields: int | _Numbers | bytes) -> T:
    """Most clients are of a few kinds; a hello with more numbers than they send is not worth the memory."""
    if sum(len(field) for field in fields if isinstance(field, tuple)) > _MAX_KEPT_NUMBERS:
        return compute.__wrapped__(*fields)
    return compute(*fields)


def _without_grease(values: _Numbers) -> _Numbers:
    return tuple(value for value in values if value not in GREASE)


def _decimal(values: Iterable[int]) -> str:
    return "-".join(str(value) for value in values if value not in GREASE)


def _hex(values: Iterable[int]) -> str:
    return ",".join([f"{value:04x}" for value in values])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else _EMPTY


def _alpn_ends(protocol: bytes) -> str:
    """First and last character of a protocol; of its hex form if either is not an ASCII letter or digit."""
    if not protocol:
        return "00"
    first, last = protocol[:1], protocol[-1:]
    if first.isalnum() and last.isalnum():  # of bytes: ASCII only
        return (first + last).decode()
    return first.hex()[0] + last.hex()[1]

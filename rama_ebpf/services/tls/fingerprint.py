"""Fingerprints of TLS clients: JA3 and JA4, both strings that say which library (and settings) sent a ClientHello.

JA3: Althouse, Atkinson, Atkins, "TLS Fingerprinting with JA3 and JA3S" (Salesforce, 2017).
JA4: FoxIO, ``technical_details/JA4.md`` of FoxIO-LLC/ja4, the part for TLS over TCP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .client_hello import GREASE, ClientHello

__all__ = ["Ja3", "Ja4"]

_SNI: Final = 0x0000
_ALPN: Final = 0x0010
_EMPTY: Final = "000000000000"

_JA4_VERSIONS: Final = {0x0304: "13", 0x0303: "12", 0x0302: "11", 0x0301: "10", 0x0300: "s3", 0x0002: "s2"}


@dataclass(frozen=True, slots=True)
class Ja3:
    """``digest`` is the MD5 in hex by which lists name a client, ``raw`` the string it is taken of."""

    digest: str
    raw: str

    @classmethod
    def of(cls, hello: ClientHello) -> Ja3:
        """Compute the fingerprint of ``hello``."""
        raw = ",".join(
            (
                str(hello.legacy_version),
                _decimal(hello.cipher_suites),
                _decimal(hello.extensions),
                _decimal(hello.supported_groups),
                _decimal(hello.point_formats),
            )
        )
        return cls(hashlib.md5(raw.encode(), usedforsecurity=False).hexdigest(), raw)

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
        ciphers = [suite for suite in hello.cipher_suites if suite not in GREASE]
        extensions = [kind for kind in hello.extensions if kind not in GREASE]
        head = (
            f"t{_JA4_VERSIONS.get(hello.version, '00')}{'d' if _SNI in extensions else 'i'}"
            f"{min(len(ciphers), 99):02}{min(len(extensions), 99):02}{_alpn_ends(hello.alpn)}"
        )
        cipher_list = _hex(sorted(ciphers))
        extension_list = _hex(sorted(kind for kind in extensions if kind not in (_SNI, _ALPN)))
        if algorithms := _hex([value for value in hello.signature_algorithms if value not in GREASE]):
            extension_list += "_" + algorithms
        return cls(
            f"{head}_{_digest(cipher_list)}_{_digest(extension_list)}",
            f"{head}_{cipher_list}_{extension_list}",
        )

    def __str__(self) -> str:
        return self.value


def _decimal(values: Iterable[int]) -> str:
    return "-".join(str(value) for value in values if value not in GREASE)


def _hex(values: list[int]) -> str:
    return ",".join([f"{value:04x}" for value in values])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else _EMPTY


def _alpn_ends(alpn: tuple[bytes, ...]) -> str:
    """First and last character of the first protocol; of its hex form if either is not an ASCII letter or digit."""
    if not alpn or not alpn[0]:
        return "00"
    first, last = alpn[0][:1], alpn[0][-1:]
    if first.isalnum() and last.isalnum():  # of bytes: ASCII only
        return (first + last).decode()
    return first.hex()[0] + last.hex()[1]

"""Originating TLS: a connector whose streams are encrypted and whose peers have proven who they are."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ...core.address import Authority
from ...core.service import Service, check_fit
from ...core.stream import Stream
from .certs import KeyPair, load_authorities
from .errors import CertificateRejected
from .key_log import write_secrets_to
from .stream import TlsStream

__all__ = ["ClientTls", "TlsConnector", "spki_sha256"]


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Settings of the client's side.

    ``ca`` is a PEM file that replaces the system's authorities. ``pins``, if any, are SHA-256 hashes (32 bytes, see
    :func:`spki_sha256`) of the public keys of which the server must have one, on top of the verification.
    ``verify`` False accepts any certificate: then only a pin says who the server is.
    """

    verify: bool = True
    ca: Path | None = None
    alpn: tuple[str, ...] = ()
    certificate: KeyPair | None = None
    pins: frozenset[bytes] = frozenset()
    minimum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    key_log: Path | None = None

    def __post_init__(self) -> None:
        if any(len(pin) != 32 for pin in self.pins):
            raise ValueError("a pin is a SHA-256 hash of 32 bytes")

    @property
    def reads_files(self) -> bool:
        """Whether a context is made of files that were named, so that others may be unable to read them."""
        return not (self.ca is None and self.certificate is None and self.key_log is None)

    def context(self) -> ssl.SSLContext:
        """Return a new context; loading the system's authorities takes some 50 ms. Raises OSError, ValueError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = self.minimum_version
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.ca is not None:
            load_authorities(context, self.ca)
        else:
            context.load_default_certs()
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
        if self.certificate is not None:
            self.certificate.load_into(context)
        if self.key_log is not None:
            write_secrets_to(context, self.key_log)
        return context

    def check_pins(self, certificate: bytes | None, server: str) -> None:
        """Raise :class:`CertificateRejected` if there are pins and the certificate (DER) has none of these keys."""
        if self.pins and (certificate is None or spki_sha256(certificate) not in self.pins):
            raise CertificateRejected(f"the public key of {server} is not one of those that are pinned")


def spki_sha256(certificate: bytes) -> bytes:
    """Return the SHA-256 of the public key (SubjectPublicKeyInfo) of a certificate in DER, as in RFC 7469."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


class TlsConnector:
    """A service from :class:`Authority` to a :class:`TlsStream`, over the streams of another connector.

    The server must prove the host that was asked for, or ``server_name`` if one is given, which is then sent in its
    place. ``handshake_timeout`` is in seconds. Raises what ``connector`` and :meth:`TlsStream.connect` raise.
    """

    accepts = Authority

    def __init__(
        self,
        connector: Service[Authority, Stream],
        settings: ClientTls | None = None,
        *,
        server_name: str | None = None,
        handshake_timeout: float = 10.0,
        ragged_eof: bool = False,
    ) -> None:
        check_fit(self, Authority, connector)
        self._connector = connector
        self._settings = settings if settings is not None else ClientTls()
        self._context = self._settings.context()
        self._server_name = server_name
        self._timeout = handshake_timeout
        self._ragged_eof = ragged_eof

    async def __call__(self, target: Authority, /) -> TlsStream:
        transport = await self._connector(target)
        try:
            stream = await TlsStream.connect(
                transport,
                self._context,
                server_name=self._server_name or str(target.host),
                timeout=self._timeout,
                ragged_eof=self._ragged_eof,
            )
            self._settings.check_pins(stream.parameters.peer_certificate, str(target))
        except BaseException:
            transport.abort()
            raise
        return stream

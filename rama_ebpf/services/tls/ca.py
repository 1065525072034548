"""A certificate authority for interception: made once, trusted by the clients, signs a leaf for each server.

Certificates are built with ``cryptography``. All leaves share one P-256 key: to make a key for each would take longer
than to sign, and whoever holds the process's memory holds the authority's key anyway.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import ssl
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .certs import KeyPair, ServerTls, refuse_mark
from .openssl import OpenSslUnavailable, set_certificate

__all__ = ["CertificateAuthority", "Leaf", "LeafIssuer"]

_DAY: Final = datetime.timedelta(days=1)
_MAX_COMMON_NAME: Final = 64


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a leaf certificate is to say. ``names`` are DNS names and IP addresses, at least one."""

    names: tuple[x509.DNSName | x509.IPAddress, ...]
    common_name: str | None
    not_before: datetime.datetime
    not_after: datetime.datetime

    @classmethod
    def of_name(cls, name: str, *, days: int = 90) -> Leaf:
        """A leaf for one host name or address, valid from an hour ago for ``days`` days."""
        started = _now() - datetime.timedelta(hours=1)
        return cls((_general_name(name),), name, started, started + days * _DAY)

    @classmethod
    def mirroring(cls, certificate: x509.Certificate, name: str) -> Leaf:
        """A leaf with the names and the validity of ``certificate``, or for ``name`` if it has no names."""
        found: list[x509.DNSName | x509.IPAddress] = []
        try:
            extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            found = [entry for entry in extension.value if isinstance(entry, x509.DNSName | x509.IPAddress)]
        except x509.ExtensionNotFound:
            pass  # an old certificate that names its host by the common name alone
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return cls(
            tuple(found) or (_general_name(name),),
            str(common[0].value) if common else None,
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
        )


def _general_name(name: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class CertificateAuthority:
    """An authority's certificate and private key (P-256, P-384 or RSA).

    Raises ValueError if they do not belong together, the certificate is none of an authority, or it has expired.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
        if _spki(certificate.public_key()) != _spki(key.public_key()):
            raise ValueError("the authority's key does not belong to its certificate")
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        except x509.ExtensionNotFound:
            raise ValueError("the certificate is not one of an authority") from None
        if not constraints.ca:
            raise ValueError("the certificate is not one of an authority")
        now = _now()
        if certificate.not_valid_after_utc <= now:
            raise ValueError(f"the authority's certificate has expired ({certificate.not_valid_after_utc})")
        if certificate.not_valid_before_utc > now:
            raise ValueError(
                f"the authority's certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, "
                f"and this host's clock says {now:%Y-%m-%d %H:%M} UTC: set the clock"
            )
        self.certificate = certificate
        self._key = key
        self._identifier = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        )

    @classmethod
    def create(cls, common_name: str = "rama-ebpf CA", *, days: int = 3650) -> CertificateAuthority:
        """Make a new authority with a P-256 key, valid from an hour ago for ``days`` days.

        It may sign leaves but no further authorities.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        started = _now() - datetime.timedelta(hours=1)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(started)
            .not_valid_after(started + days * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, certificate: Path, key: Path) -> CertificateAuthority:
        """Read PEM files, the key without a passphrase. Raises OSError or ValueError, naming the file."""
        for path in (certificate, key):
            refuse_mark(path)
        try:
            loaded_certificate = x509.load_pem_x509_certificate(certificate.read_bytes())
        except ValueError as error:
            raise ValueError(f"{certificate}: {error}") from error
        try:
            loaded_key = load_pem_private_key(key.read_bytes(), None)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}: {error}") from error
        if not isinstance(loaded_key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise ValueError(f"{key}: an authority's key must be an elliptic curve or RSA key")
        return cls(loaded_certificate, loaded_key)

    def save(self, certificate: Path, key: Path) -> None:
        """Write PEM files that do not exist yet, the key for its owner alone (0600): both, whole and on disk, or none.

        Raises FileExistsError: an authority that clients trust must not be lost by a repeated command. Raises OSError
        where the file system refuses.
        """
        pem = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_new(key, pem, 0o600)
        try:
            _write_new(certificate, self.pem, 0o644)
        except BaseException:
            key.unlink()
            raise

    @property
    def pem(self) -> bytes:
        """The certificate that clients are to trust."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, as browsers and ``openssl x509 -fingerprint`` show it."""
        return self.certificate.fingerprint(hashes.SHA256()).hex(":").upper()

    def issue(self, leaf: Leaf, public_key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        """Sign a server certificate; its validity is cut to the authority's own."""
        subject = []
        if leaf.common_name is not None and len(leaf.common_name) <= _MAX_COMMON_NAME:
            subject.append(x509.NameAttribute(NameOID.COMMON_NAME, leaf.common_name))
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(leaf.not_before, self.certificate.not_valid_before_utc))
            .not_valid_after(min(leaf.not_after, self.certificate.not_valid_after_utc))
            # RFC 5280 section 4.2.1.6: critical where it is all that names the subject.
            .add_extension(x509.SubjectAlternativeName(leaf.names), critical=not subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(self._identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )


class LeafIssuer:
    """Makes server contexts with leaves of an authority, and keeps the ``cache_size`` used last.

    ``settings`` are those of the listener, apart from ALPN, which each context has by itself.
    """

    def __init__(
        self, authority: CertificateAuthority, settings: ServerTls | None = None, *, cache_size: int = 1024
    ) -> None:
        if cache_size < 1:
            raise ValueError(f"cache_size must be at least 1, not {cache_size}")
        self.authority = authority
        self._settings = settings if settings is not None else ServerTls()
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple[bytes, str, tuple[str, ...]], ssl.SSLContext] = OrderedDict()
        self._key = _LeafKey(authority)

    def mirroring(self, certificate: bytes, name: str, alpn: Iterable[str] = ()) -> ssl.SSLContext:
        """Return a context that stands in for the server with ``certificate`` (DER), asked for by ``name``."""
        cached = (hashlib.sha256(certificate).digest(), name, tuple(alpn))
        context = self._cache.get(cached)
        if context is None:
            leaf = Leaf.mirroring(x509.load_der_x509_certificate(certificate), name)
            context = self._remember(cached, self._context(leaf, cached[2]))
        self._cache.move_to_end(cached)
        return context

    def for_name(self, name: str, alpn: Iterable[str] = ()) -> ssl.SSLContext:
        """Return a context for a host name or address of which no server is known."""
        cached = (b"", name, tuple(alpn))
        context = self._cache.get(cached)
        if context is None:
            context = self._remember(cached, self._context(Leaf.of_name(name), cached[2]))
        self._cache.move_to_end(cached)
        return context

    def _remember(self, key: tuple[bytes, str, tuple[str, ...]], context: ssl.SSLContext) -> ssl.SSLContext:
        self._cache[key] = context
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return context

    def _context(self, leaf: Leaf, alpn: tuple[str, ...]) -> ssl.SSLContext:
        certificate = self.authority.issue(leaf, self._key.public_key)
        return replace(self._settings, alpn=alpn).context(_Issued(certificate, self._key))


class _LeafKey:
    """The private key of all leaves of an authority, with the chain that goes with each of them."""

    def __init__(self, authority: CertificateAuthority) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        self.public_key = key.public_key()
        self._pem = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        own = authority.certificate
        # A root is not sent, for the client has it; an intermediate is.
        self._chain = b"" if own.subject == own.issuer else authority.pem
        self._model = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._load(authority.issue(Leaf.of_name("model.invalid"), self.public_key), self._model)

    def load_into(self, context: ssl.SSLContext, certificate: x509.Certificate) -> None:
        """Give a context this key, a certificate for it, and the chain."""
        try:
            set_certificate(context, certificate.public_bytes(Encoding.DER), self._model)
        except OpenSslUnavailable:
            self._load(certificate, context)

    def _load(self, certificate: x509.Certificate, context: ssl.SSLContext) -> None:
        # Python's ssl reads certificates and keys from files only; this one never touches a disk.
        file = os.memfd_create("leaf", os.MFD_CLOEXEC)
        try:
            with open(file, "wb", closefd=False) as writer:
                writer.write(self._pem + certificate.public_bytes(Encoding.PEM) + self._chain)
            path = Path(f"/proc/self/fd/{file}")
            KeyPair(path, path).load_into(context)
        finally:
            os.close(file)


@dataclass(frozen=True, slots=True)
class _Issued:
    """The credential of one leaf."""

    certificate: x509.Certificate
    key: _LeafKey

    def load_into(self, context: ssl.SSLContext) -> None:
        self.key.load_into(context, self.certificate)

    def identity(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _spki(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise ValueError("an authority's key must be an elliptic curve or RSA key")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(temporary, path)  # unlike a renaming it replaces nothing
        except FileExistsError as error:
            raise FileExistsError(error.errno, error.strerror, str(path)) from None
    finally:
        os.unlink(temporary)

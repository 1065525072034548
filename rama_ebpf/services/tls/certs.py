"""Which certificate a client is shown: a listener's settings, and stores that pick by server name and reload."""

from __future__ import annotations

import enum
import logging
import os
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.x509.oid import NameOID

from ...core.text_file import begins_with_mark
from .alert import Alert
from .client_hello import ClientHello
from .errors import AlertError
from .key_log import write_secrets_to
from .openssl import OpenSslUnavailable, set_groups
from .tickets import TicketKeys

__all__ = [
    "CertificateStore",
    "ClientAuth",
    "Credential",
    "KeyPair",
    "SelectContext",
    "ServerTls",
    "certificate_names",
    "load_authorities",
    "pairs_in",
    "refuse_mark",
]

log = logging.getLogger(__name__)

SelectContext = Callable[[ClientHello], Awaitable[ssl.SSLContext]]
"""Chooses the context for a client, before anything is answered; raises :class:`AlertError` to refuse it."""

# Mozilla's "intermediate" list (server side TLS guidelines 5.7) without its finite-field suites, for TLS 1.2. The
# suites of TLS 1.3 are all good and OpenSSL's own.
_TLS12_CIPHERS: Final = ":".join(
    f"ECDHE-{key}-{cipher}"
    for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    for key in ("ECDSA", "RSA")
)


# Mozilla's list likewise; the hybrid that is safe from quantum computers needs OpenSSL 3.5.
_GROUPS: Final = ("X25519MLKEM768:" if ssl.OPENSSL_VERSION_INFO >= (3, 5) else "") + "X25519:P-256:P-384"


class ClientAuth(enum.Enum):
    """Whether clients show a certificate."""

    NONE = "none"
    OPTIONAL = "optional"
    """A client may come without one, but one that it shows must verify."""
    REQUIRED = "required"


class Credential(Protocol):
    """A certificate with its intermediates and its private key, wherever they are kept."""

    def load_into(self, context: ssl.SSLContext) -> None:
        """Give them to a context."""

    def identity(self) -> bytes:
        """Return what is different for another certificate: session tickets are bound to it."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Paths of PEM files: ``chain`` holds the certificate and its intermediates, ``key`` the private key."""

    chain: Path
    key: Path

    def load_into(self, context: ssl.SSLContext) -> None:
        """Give them to a context. Raises OSError, or ValueError naming the files if they are unfit."""
        for path in (self.chain, self.key):
            refuse_mark(path)
        try:
            context.load_cert_chain(self.chain, self.key, password=_no_passphrase)
        except ssl.SSLError as error:
            what = {"KEY_VALUES_MISMATCH": "the key does not belong to the certificate"}.get(error.reason)
            raise ValueError(f"{self.chain}, {self.key}: {what or 'not a PEM certificate and key'}") from error

    def identity(self) -> bytes:
        """Return the certificates as they are in the file. Raises OSError."""
        return self.chain.read_bytes()


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Settings of a listener, apart from its certificates.

    ``alpn``: protocols in order of preference; a client that offers others only is refused (RFC 7301 section 3.2).
    ``client_ca`` (PEM) verifies clients' certificates and ``client_crl`` (PEM, needs a list of that CA) revokes
    them. ``ticket_keys`` lets workers resume each other's sessions. ``key_log`` is a file that gets the secrets of
    every connection in the format that Wireshark reads: never in production.
    """

    minimum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    alpn: tuple[str, ...] = ()
    client_auth: ClientAuth = ClientAuth.NONE
    client_ca: Path | None = None
    client_crl: Path | None = None
    ticket_keys: TicketKeys | None = None
    key_log: Path | None = None

    def __post_init__(self) -> None:
        if (self.client_auth is ClientAuth.NONE) != (self.client_ca is None):
            raise ValueError("client_auth needs client_ca, and the other way round")
        if self.client_crl is not None and self.client_ca is None:
            raise ValueError("client_crl needs client_ca")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that these settings name and a reload looks at."""
        return tuple(path for path in (self.client_ca, self.client_crl) if path is not None)

    def context(self, credential: Credential) -> ssl.SSLContext:
        """Return a context for one certificate. Raises OSError, or ValueError naming the file that is unfit."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = self.minimum_version
        context.set_ciphers(_TLS12_CIPHERS)
        context.options |= ssl.OP_NO_RENEGOTIATION
        # Every suite on the list is good, and the client knows whether it has AES in hardware.
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        credential.load_into(context)
        try:
            set_groups(context, _GROUPS)
        except OpenSslUnavailable as error:
            log.debug("OpenSSL's own choice of groups stays: %s", error)
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
        if self.client_ca is not None:
            required = self.client_auth is ClientAuth.REQUIRED
            context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
            load_authorities(context, self.client_ca)
        if self.client_crl is not None:
            load_authorities(context, self.client_crl)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        if self.ticket_keys is not None:
            scope = b"".join((credential.identity(), *(path.read_bytes() for path in self.files)))
            try:
                self.ticket_keys.install(context, self.client_auth.value.encode() + scope)
            except OpenSslUnavailable as error:
                log.warning("session tickets are not shared between workers: %s", error)
        if self.key_log is not None:
            write_secrets_to(context, self.key_log)
        return context

    def check_alpn(self, hello: ClientHello) -> None:
        """Raise :class:`AlertError` if the client offers protocols and none of them is served. HTTP/1.0 is, where 1.1
        is: it needs no agreement."""
        served = {name.encode() for name in self.alpn}
        if b"http/1.1" in served:
            served.add(b"http/1.0")
        if served and hello.alpn and served.isdisjoint(hello.alpn):
            offered = b", ".join(hello.alpn).decode(errors="replace")
            raise AlertError(f"none of the client's protocols is served: {offered}", Alert.NO_APPLICATION_PROTOCOL)


def _no_passphrase() -> str:
    raise ValueError("the private key is encrypted: a server has nobody to ask for its passphrase")


def load_authorities(context: ssl.SSLContext, file: Path) -> None:
    """Have a context trust the certificates, and heed the revocation lists, in a PEM file.

    Raises OSError, or ValueError naming the file if it has none.
    """
    refuse_mark(file)
    try:
        context.load_verify_locations(cafile=file)
    except ssl.SSLError as error:
        raise ValueError(f"{file}: no PEM certificate or revocation list in it") from error


def refuse_mark(file: Path) -> None:
    """Raise ValueError for a PEM file that begins with a byte order mark: OpenSSL would pass over its first block, and
    without a word where there are others. Raises OSError if it cannot be read."""
    if begins_with_mark(file):
        raise ValueError(f"{file}: begins with a byte order mark: save it as UTF-8 without one, or as ASCII")


def certificate_names(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the DNS names that a certificate is for, in lower case: its SANs, or its common name if it has none."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return tuple(str(attribute.value).lower() for attribute in common)
    return tuple(name.lower() for name in extension.value.get_values_for_type(x509.DNSName))


@dataclass(frozen=True, slots=True)
class _Entry:
    context: ssl.SSLContext
    names: tuple[str, ...]
    files: tuple[Path, ...]
    signature: tuple[tuple[int, int, int], ...]


class CertificateStore:
    """Picks a context by server name among certificates in files; a :data:`SelectContext`.

    A certificate serves the names it is for, with ``*`` for one label (RFC 9525 section 6.3). The first one serves
    every other client, unless ``strict_sni`` refuses those. At most every ``check_every`` seconds, and only while
    clients come, the files are looked at; what has changed is loaded anew and serves the next client. A file that
    cannot be loaded is logged and what it replaces goes on to serve; at construction it raises.
    """

    def __init__(
        self,
        settings: ServerTls,
        pairs: Callable[[], Iterable[KeyPair]],
        *,
        strict_sni: bool = False,
        check_every: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._pairs = pairs
        self._strict_sni = strict_sni
        self._check_every = check_every
        self._clock = clock
        self._entries = {pair: self._load(pair) for pair in pairs()}
        self._bad: dict[KeyPair, tuple[tuple[int, int, int], ...] | None] = {}
        if not self._entries:
            raise ValueError("no certificate: a TLS listener needs one")
        self._by_name = _index(self._entries.values())
        self._checked = clock()
        self._complaint = ""

    @classmethod
    def of_files(cls, settings: ServerTls, *pairs: KeyPair, strict_sni: bool = False) -> CertificateStore:
        """A store of the given certificates."""
        return cls(settings, lambda: pairs, strict_sni=strict_sni)

    @classmethod
    def of_directory(cls, settings: ServerTls, directory: Path, *, strict_sni: bool = False) -> CertificateStore:
        """A store of all certificates in ``directory``, in order of their names.

        Taken are ``NAME.crt`` with ``NAME.key``, ``NAME.pem`` with ``NAME.key``, ``NAME.pem`` that holds both, and
        subdirectories with ``fullchain.pem`` and ``privkey.pem``. A pair named ``default`` comes first.
        """
        return cls(settings, lambda: pairs_in(directory), strict_sni=strict_sni)

    async def __call__(self, hello: ClientHello, /) -> ssl.SSLContext:
        if self._clock() - self._checked >= self._check_every:
            self.reload()
        self._settings.check_alpn(hello)
        name = hello.server_name
        if name is not None:
            entry = self._by_name.get(name) or self._by_name.get("*." + name.partition(".")[2])
            if entry is not None:
                return entry.context
        if self._strict_sni:
            raise AlertError(f"no certificate for server name {name}", Alert.UNRECOGNIZED_NAME)
        return next(iter(self._entries.values())).context

    def reload(self) -> None:
        """Look at the files now. Never raises: what cannot be loaded is logged once, and again when it changes."""
        self._checked = self._clock()
        entries: dict[KeyPair, _Entry] = {}
        bad: dict[KeyPair, tuple[tuple[int, int, int], ...] | None] = {}
        try:
            pairs = list(self._pairs())
        except OSError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.warning("cannot look for certificates, the old ones serve on: %s%s", error, _remedy(error))
            return
        self._complaint = ""
        for pair in pairs:
            old = self._entries.get(pair)
            signature = None
            try:
                signature = _signature((pair.chain, pair.key, *self._settings.files))
                if old is not None and old.signature == signature:
                    entries[pair] = old
                    continue
                if pair not in self._bad or self._bad[pair] != signature:
                    entries[pair] = self._load(pair)
                    log.info("certificate %s loaded", pair.chain)
                    continue
            except (OSError, ValueError) as error:
                if pair not in self._bad or self._bad[pair] != signature:
                    unseen = signature is None and isinstance(error, PermissionError)
                    why = "not watched" if unseen else "not loaded"
                    log.log(
                        logging.INFO if unseen else logging.WARNING,
                        "certificate %s %s%s: %s%s",
                        *(pair.chain, why, "" if old is None else ", the old one serves on", error, _remedy(error)),
                    )
            bad[pair] = signature
            if old is not None:
                entries[pair] = old
        self._bad = bad
        if not entries:
            log.warning("no certificate is left: the old ones go on to serve")
            return
        if entries != self._entries:
            self._entries = entries
            self._by_name = _index(entries.values())

    def _load(self, pair: KeyPair) -> _Entry:
        files = (pair.chain, pair.key, *self._settings.files)
        # Taken before the files are read: a change during the reading shows at the next look.
        signature = _signature(files)
        context = self._settings.context(pair)
        certificate = x509.load_pem_x509_certificates(pair.chain.read_bytes())[0]
        return _Entry(context, certificate_names(certificate), files, signature)


def _remedy(error: Exception) -> str:
    """What to do where a process that has given up its privileges cannot read."""
    return " (send SIGHUP after a renewal: root reads it then)" if isinstance(error, PermissionError) else ""


def _index(entries: Iterable[_Entry]) -> dict[str, _Entry]:
    index: dict[str, _Entry] = {}
    for entry in entries:
        for name in entry.names:
            index.setdefault(name, entry)
    return index


def _signature(files: Sequence[Path]) -> tuple[tuple[int, int, int], ...]:
    found = map(os.stat, files)
    return tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in found)


def pairs_in(directory: Path) -> list[KeyPair]:
    """Return the pairs of :meth:`CertificateStore.of_directory`. Raises OSError."""
    pairs = {}
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            if (path / "fullchain.pem").exists():
                pairs[path.name] = KeyPair(path / "fullchain.pem", path / "privkey.pem")
        elif path.suffix in (".crt", ".pem"):
            key = path.with_suffix(".key")
            pairs[path.stem] = KeyPair(path, key if key.exists() or path.suffix == ".crt" else path)
    first = pairs.pop("default", None)
    return [first, *pairs.values()] if first is not None else list(pairs.values())

"""TLS in a configuration: terminate it, pass it through by name, judge it and intercept it inside other protocols."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from ..core.address import Authority
from ..core.names import NameMap
from ..core.service import Layer, Service, stack
from ..core.shares import Held, SourceShare
from ..core.stream import Stream
from ..services.connect import Connector, Egress, Resolver
from ..services.forward import Forward
from ..services.http import HttpInspector
from ..services.tls import (
    CertificateAuthority,
    CertificateStore,
    ClientAuth,
    ClientTls,
    KeyPair,
    LeafIssuer,
    Rejections,
    ServerTls,
    TicketKeys,
    TlsAction,
    TlsInterceptor,
    TlsMatch,
    TlsPassthrough,
    TlsPeekLayer,
    TlsPolicyLayer,
    TlsRule,
    TlsTerminateLayer,
    TlsTunnelLayer,
)
from .decode import ListOf, MapOf, Table, setting
from .http import HttpTimeoutSettings
from .kinds import AUTHORITY, BOOLEAN, DURATION, HOST_PATTERN, PORT, TEXT, Kind, choice, file_path, integer

__all__ = ["TlsEnvironment", "TlsPassthroughSettings", "TlsSettings", "TlsTunnelSettings"]

_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_ACTION: Final = choice(*(action.value for action in TlsAction))


def _parse_new_file(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("write the path of a file")
    if not os.access(os.path.dirname(value) or ".", os.W_OK):
        raise ValueError("its directory is not there, or nothing can be written into it")
    return value


_NEW_FILE: Final = Kind("path of a file to write", _parse_new_file, is_path=True, is_secret=True)


class TlsEnvironment(Protocol):
    """What TLS finds where it runs."""

    @property
    def secret(self) -> bytes:
        """32 random bytes that all workers share."""

    @property
    def resolver(self) -> Resolver: ...

    @property
    def egress(self) -> Egress: ...

    def share(self, held: Held, /) -> SourceShare:
        """Return a new count of what each source holds."""

    @property
    def connector(self) -> Service[Authority, Stream] | None:
        """How the stack's targets are reached."""


@dataclass(frozen=True)
class TlsRuleSettings:
    """A rule for what a ClientHello shows; all that is given must hold."""

    name: str = setting(TEXT, "appears in log lines")
    action: str = setting(_ACTION, "allow, close, or close and count a strike")
    sni: tuple[str, ...] = setting(ListOf(HOST_PATTERN), "server names, one of which the client asks for", default=())
    no_sni: bool = setting(BOOLEAN, "the client names no server", default=False)
    alpn: tuple[str, ...] = setting(ListOf(TEXT), "protocols, one of which it offers", default=())
    ja4: tuple[str, ...] = setting(ListOf(TEXT), 'fingerprints, or their beginnings: "t13d1516h2_*"', default=())

    def __post_init__(self) -> None:
        self.rule()

    def rule(self) -> TlsRule:
        """Return it as the policy takes it."""
        match = TlsMatch(sni=self.sni, no_sni=self.no_sni, alpn=self.alpn, ja4=self.ja4)
        return TlsRule(self.name, match, TlsAction(self.action))


@dataclass(frozen=True)
class TlsSettings:
    """Terminate TLS."""

    chain: str | None = setting(file_path(), "PEM file of the certificate and its intermediates", default=None)
    key: str | None = setting(file_path(secret=True), "PEM file of its private key", default=None)
    directory: str | None = setting(
        file_path(secret=True), "directory of certificates, instead of chain and key", default=None
    )
    alpn: tuple[str, ...] = setting(ListOf(TEXT), "protocols in order of preference", default=())
    strict_sni: bool = setting(BOOLEAN, "refuse clients that name none of the servers", default=False)
    minimum_version: str = setting(choice(*_VERSIONS), "of TLS", default="1.2")
    client_ca: str | None = setting(file_path(), "PEM file of the authority of clients' certificates", default=None)
    client_crl: str | None = setting(file_path(), "PEM file of its revocation list", default=None)
    client_auth: str = setting(choice("optional", "required"), "need clients show one", default="required")
    rules: tuple[TlsRuleSettings, ...] = setting(ListOf(Table(TlsRuleSettings)), "the first that matches", default=())
    default: str = setting(_ACTION, "where no rule matches", default="allow")
    fallback: Authority | None = setting(AUTHORITY, "target of clients that do not speak TLS", default=None)
    ragged_eof: bool = setting(BOOLEAN, "bear clients that end without close_notify", default=False)
    handshake: float = setting(DURATION, "time for the handshake", default=10.0)
    max_handshakes: int = setting(integer(1, 1_000_000), "under way at once, in each worker", default=1000)
    key_log: str | None = setting(_NEW_FILE, "gets every connection's secrets: for Wireshark only", default=None)

    def __post_init__(self) -> None:
        if (self.directory is None) == (self.chain is None) or (self.chain is None) != (self.key is None):
            raise ValueError("name chain and key, or a directory")
        if self.client_crl is not None and self.client_ca is None:
            raise ValueError("client_crl needs client_ca")

    def make(self, environment: TlsEnvironment) -> Layer:
        """Load the certificates and make the layer."""
        settings = ServerTls(
            minimum_version=_VERSIONS[self.minimum_version],
            alpn=self.alpn,
            client_auth=ClientAuth.NONE if self.client_ca is None else ClientAuth(self.client_auth),
            client_ca=_path(self.client_ca),
            client_crl=_path(self.client_crl),
            ticket_keys=TicketKeys(environment.secret),
            key_log=_path(self.key_log),
        )
        if self.directory is not None:
            store = CertificateStore.of_directory(settings, Path(self.directory), strict_sni=self.strict_sni)
        else:
            pair = KeyPair(Path(self.chain or ""), Path(self.key or ""))
            store = CertificateStore.of_files(settings, pair, strict_sni=self.strict_sni)
        connector = Connector(environment.resolver, environment.egress)
        return TlsTerminateLayer(
            store,
            fallback=None if self.fallback is None else Forward(connector, self.fallback),
            policy=_policy(self.rules, self.default),
            handshake_timeout=self.handshake,
            max_handshakes=self.max_handshakes,
            handshakes=environment.share(Held.HANDSHAKES),
            ragged_eof=self.ragged_eof,
        )


@dataclass(frozen=True)
class InterceptSettings:
    """Decrypt with an authority that the clients trust (rama-ebpf ca create)."""

    ca: str = setting(file_path(), "PEM file of the authority's certificate")
    ca_key: str = setting(file_path(secret=True), "PEM file of its key")
    bypass: tuple[str, ...] = setting(
        ListOf(HOST_PATTERN), "server names that are passed through, where they are the target, too", default=()
    )
    verify_bypass: bool = setting(BOOLEAN, "and where the server has a certificate for them", default=True)
    upstream_ca: str | None = setting(file_path(), "PEM file, for the system's authorities", default=None)
    alpn: tuple[str, ...] = setting(ListOf(TEXT), "protocols that may be agreed on", default=("h2", "http/1.1"))
    learn: bool = setting(BOOLEAN, "pass through to a client names for which it refused our certificate", default=False)
    remember: float = setting(DURATION, "with learn: for how long", default=3600.0)
    hang_ups: int = setting(integer(1, 1000), "with learn: in a row that count as a refusal", default=3)
    cache: int = setting(integer(1, 1_000_000), "certificates kept, in each worker", default=1024)
    timeouts: HttpTimeoutSettings | None = setting(
        Table(HttpTimeoutSettings),
        "serve HTTP inside as a proxy, and wait so long (else it is relayed)",
        default=None,
    )

    def make(self, environment: TlsEnvironment) -> TlsInterceptor:
        """Load the authority."""
        return TlsInterceptor(
            LeafIssuer(CertificateAuthority.load(Path(self.ca), Path(self.ca_key)), cache_size=self.cache),
            ClientTls(ca=_path(self.upstream_ca), alpn=self.alpn),
            bypass=self.bypass,
            connector=environment.connector,
            verify_bypass=self.verify_bypass,
            rejections=Rejections(ttl=self.remember, hang_ups=self.hang_ups) if self.learn else None,
            inspect=None if self.timeouts is None else HttpInspector(timeouts=self.timeouts.timeouts()),
            handshakes=environment.share(Held.HANDSHAKES),
        )


@dataclass(frozen=True)
class TlsTunnelSettings:
    """Look into the tunnels of the protocol inside: judge and intercept the TLS in them."""

    rules: tuple[TlsRuleSettings, ...] = setting(ListOf(Table(TlsRuleSettings)), "the first that matches", default=())
    default: str = setting(_ACTION, "where no rule matches", default="allow")
    intercept: InterceptSettings | None = setting(Table(InterceptSettings), "decrypt the rest", default=None)
    fail_open: bool = setting(BOOLEAN, "relay a ClientHello that cannot be read", default=False)
    handshake: float = setting(DURATION, "time for a ClientHello", default=10.0)

    def make(self, environment: TlsEnvironment) -> Layer:
        """Make the layer."""
        return TlsTunnelLayer(
            policy=_policy(self.rules, self.default),
            intercept=None if self.intercept is None else self.intercept.make(environment),
            fail_open=self.fail_open,
            timeout=self.handshake,
        )


@dataclass(frozen=True)
class TlsPassthroughSettings:
    """Connect TLS clients to the server that they name, without decrypting."""

    targets: Mapping[str, Authority] = setting(MapOf(AUTHORITY), "targets by server name or pattern", factory=dict)
    port: int | None = setting(PORT, "of servers that targets does not hold (those are refused)", default=None)
    no_sni: Authority | None = setting(AUTHORITY, "target of clients that name no server", default=None)
    fallback: Authority | None = setting(AUTHORITY, "target of clients that do not speak TLS", default=None)
    fail_open: bool = setting(BOOLEAN, "and of those whose ClientHello cannot be read", default=False)
    rules: tuple[TlsRuleSettings, ...] = setting(ListOf(Table(TlsRuleSettings)), "the first that matches", default=())
    default: str = setting(_ACTION, "where no rule matches", default="allow")
    handshake: float = setting(DURATION, "time for a ClientHello", default=10.0)

    def __post_init__(self) -> None:
        NameMap(self.targets.items())  # raises ValueError for a pattern that is none
        if not self.targets and self.port is None and self.no_sni is None:
            raise ValueError("name targets, or the port of servers whatever their name")
        if self.fail_open and self.fallback is None:
            raise ValueError("fail_open needs fallback")

    def make(self, environment: TlsEnvironment, connector: Service[Authority, Stream]) -> Service[Stream, Any]:
        """Make the service."""
        fallback = None if self.fallback is None else Forward(connector, self.fallback)
        return stack(
            TlsPeekLayer(
                fallback=fallback,
                fail_open=self.fail_open,
                timeout=self.handshake,
                handshakes=environment.share(Held.HANDSHAKES),
            ),
            *([] if (policy := _policy(self.rules, self.default)) is None else [policy]),
            TlsPassthrough(connector, targets=NameMap(self.targets.items()), port=self.port, no_sni=self.no_sni),
        )


def _policy(rules: Sequence[TlsRuleSettings], default: str) -> TlsPolicyLayer | None:
    if not rules and default == TlsAction.ALLOW.value:
        return None
    return TlsPolicyLayer([rule.rule() for rule in rules], default=TlsAction(default))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)

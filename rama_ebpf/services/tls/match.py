"""Deciding on what a ClientHello shows: a match, routes to services, and a policy of allow, close and strike."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...core.errors import PolicyDenied, PolicyStrike
from ...core.names import NameSet
from ...core.service import Output, Service, check_fit
from ...core.stream import Stream
from .alert import Alert
from .client_hello import ClientHello
from .errors import AlertError
from .fingerprint import Ja4

__all__ = ["TlsAction", "TlsDenied", "TlsMatch", "TlsPolicyLayer", "TlsRoute", "TlsRouter", "TlsRule", "TlsStrike"]


class TlsMatch:
    """A condition on a ClientHello; every part that is given must hold, and an empty match holds always.

    ``sni``: patterns of :class:`~rama_ebpf.core.names.NameMap`, one of which matches the server name.
    ``alpn``: protocols, one of which is offered. ``ja4``: fingerprints, one of which is the client's; one that ends
    in ``*`` is a prefix. ``no_sni``: true for clients that name no server.
    """

    def __init__(
        self,
        *,
        sni: Iterable[str] = (),
        alpn: Iterable[str] = (),
        ja4: Iterable[str] = (),
        no_sni: bool = False,
    ) -> None:
        self._sni = NameSet(sni)
        self._alpn = frozenset(name.encode("ascii") for name in alpn)
        fingerprints = tuple(ja4)
        self._ja4 = frozenset(value for value in fingerprints if not value.endswith("*"))
        self._ja4_prefixes = tuple(value[:-1] for value in fingerprints if value.endswith("*"))
        self._no_sni = no_sni
        if no_sni and self._sni:
            raise ValueError("sni and no_sni exclude each other")

    def __call__(self, hello: ClientHello, ja4: str) -> bool:
        """Whether the client that sent ``hello``, whose fingerprint is ``ja4``, meets the condition."""
        if self._no_sni and hello.server_name is not None:
            return False
        if self._sni and hello.server_name not in self._sni:
            return False
        if self._alpn and self._alpn.isdisjoint(hello.alpn):
            return False
        if self._ja4 or self._ja4_prefixes:
            return ja4 in self._ja4 or ja4.startswith(self._ja4_prefixes)
        return True


@dataclass(frozen=True, slots=True)
class TlsRoute:
    """Streams that meet ``match`` go to ``service``."""

    match: TlsMatch
    service: Service[Stream, Any]


class TlsRouter:
    """A service that hands a peeked stream, still unread, to the first route whose match holds, else to ``default``.

    Needs a :class:`~.peek.TlsPeekLayer` outside it. Where no route holds and there is no default the client is sent
    the alert ``unrecognized_name`` and :class:`AlertError` is raised.
    """

    accepts = Stream
    needs = (ClientHello, Ja4)

    def __init__(self, routes: Iterable[TlsRoute], default: Service[Stream, Any] | None = None) -> None:
        self._routes = tuple(routes)
        for route in self._routes:
            check_fit(self, Stream, route.service)
        if default is not None:
            check_fit(self, Stream, default)
        self._default = default

    async def __call__(self, stream: Stream, /) -> Any:
        hello = stream.extensions.require(ClientHello)
        ja4 = stream.extensions.require(Ja4).value
        for route in self._routes:
            if route.match(hello, ja4):
                return await route.service(stream)
        if self._default is not None:
            return await self._default(stream)
        error = AlertError(f"no route for {hello.server_name} ({ja4})", Alert.UNRECOGNIZED_NAME)
        await stream.close_after(error.wire)
        raise error


class TlsAction(enum.Enum):
    """What a rule does with a client."""

    ALLOW = "allow"
    CLOSE = "close"
    """Send the alert ``access_denied`` and close."""
    STRIKE = "strike"
    """Cut the connection (:class:`TlsStrike`) and count a strike with the
    :class:`~rama_ebpf.layers.strikes.StrikeLayer` outside, which bans the source."""


@dataclass(frozen=True, slots=True)
class TlsRule:
    """A named rule; ``name`` appears in the error and so in the log line."""

    name: str
    match: TlsMatch
    action: TlsAction


class TlsDenied(PolicyDenied):
    """Policy refuses a client for what its ClientHello shows."""

    kind = "tls_denied"


class TlsStrike(PolicyStrike):
    """Policy refuses a client for what its ClientHello shows, and holds it against its address."""

    kind = "tls_strike"


class TlsPolicyLayer:
    """Lets streams pass by the first rule whose match holds; where none does, ``default`` decides.

    Needs a :class:`~.peek.TlsPeekLayer` outside it. Raises :class:`TlsDenied` or :class:`TlsStrike`.
    """

    accepts = Stream
    needs = (ClientHello, Ja4)

    def __init__(self, rules: Iterable[TlsRule], *, default: TlsAction = TlsAction.ALLOW) -> None:
        self._rules = tuple(rules)
        self._default = default

    def decide(self, hello: ClientHello, ja4: str) -> tuple[TlsAction, str]:
        """Return the action and the name of the rule that decided ("default" if none matched)."""
        for rule in self._rules:
            if rule.match(hello, ja4):
                return rule.action, rule.name
        return self._default, "default"

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def serve(stream: Stream, /) -> Output:
            await self.check(stream)
            return await inner(stream)

        return serve

    async def check(self, stream: Stream) -> None:
        """Return if a stream whose ClientHello was looked at may pass; else tell the client, and raise."""
        hello = stream.extensions.require(ClientHello)
        ja4 = stream.extensions.require(Ja4).value
        action, rule = self.decide(hello, ja4)
        if action is TlsAction.ALLOW:
            return
        message = f"TLS rule {rule}: server name {hello.server_name}, JA4 {ja4}"
        if action is TlsAction.STRIKE:
            raise TlsStrike(message, rule)
        await stream.close_after(Alert.ACCESS_DENIED.record)
        raise TlsDenied(message, rule)

"""Passing TLS through by its server name: the client's handshake is with the target, only bytes pass here."""

from __future__ import annotations

from ...core.address import Authority
from ...core.at_once import AtOnce, Session, Visit
from ...core.lifecycle import Lifecycle, Stage
from ...core.names import NameMap
from ...core.service import Service, check_fit
from ...core.stream import Stream
from ...core.target import Target
from ...relay import TunnelReport, relay
from ..connect import connects_at_once
from ..reaching import BegunForward, begin_forward
from .alert import Alert
from .client_hello import ClientHello
from .errors import AlertError

__all__ = ["TlsPassthrough"]


class TlsPassthrough:
    """A service that connects a peeked stream to the target that its server name stands for, and relays.

    ``targets`` maps name patterns to targets. A name that it does not hold is itself the target, at ``port``; with
    ``port`` None such names are refused. ``no_sni`` is the target of clients that name no server; without it they
    are refused. A refusal is the alert ``unrecognized_name``, raised as :class:`AlertError`; what ``connector``
    raises goes through, and the client sees its connection cut as if it had dialled itself.
    """

    accepts = Stream
    needs = (ClientHello,)

    def __init__(
        self,
        connector: Service[Authority, Stream],
        *,
        targets: NameMap[Authority] | None = None,
        port: int | None = 443,
        no_sni: Authority | None = None,
    ) -> None:
        check_fit(self, Authority, connector)
        self._connector = connector
        self._targets = targets if targets is not None else NameMap[Authority]()
        self._port = port
        self._no_sni = no_sni
        self._at_once_connector = connects_at_once(connector)
        plain = type(self).__call__ is TlsPassthrough.__call__ and self._at_once_connector is not None
        self.at_once = AtOnce(self, self._begin) if plain else None

    def _begin(self, visit: Visit) -> Session | None:
        extensions = visit.stream.extensions
        hello = extensions.get(ClientHello)
        target = None if hello is None else self._target(hello.server_name)
        if target is None or self._at_once_connector is None:
            visit.take_over()  # it is refused
            return None
        extensions.add(Authority(target.host, target.port))
        lifecycle = extensions.get(Lifecycle)
        if lifecycle is not None:
            lifecycle.reached(Stage.ESTABLISHED)
        return begin_forward(visit, self._at_once_connector, target)

    async def __call__(self, stream: Stream, /) -> TunnelReport:
        begun = BegunForward.of(stream, stream.extensions.get(BegunForward))
        if begun is not None:
            return await relay(stream, await begun.finish())
        name = stream.extensions.require(ClientHello).server_name
        target = self._target(name)
        if target is None:
            error = AlertError(f"no target for server name {name}", Alert.UNRECOGNIZED_NAME)
            await stream.close_after(error.wire)
            raise error
        stream.extensions.add(Authority(target.host, target.port))
        Lifecycle.of(stream.extensions).reached(Stage.ESTABLISHED)
        return await relay(stream, await self._connector(Target(target.host, target.port, stream.extensions)))

    def _target(self, name: str | None) -> Authority | None:
        if name is None:
            return self._no_sni
        if (found := self._targets.find(name)) is not None:
            return found
        return None if self._port is None else Authority(name, self._port)

"""Everything to one target, or to where each client meant to connect."""

from __future__ import annotations

from ..core.address import Authority
from ..core.at_once import AtOnce, Session, Visit
from ..core.client import local_address
from ..core.errors import RamaError
from ..core.service import Service, check_fit
from ..core.stream import Stream
from ..core.target import Target
from ..relay import TunnelReport, relay
from .connect import connects_at_once
from .reaching import BegunForward, begin_forward

__all__ = ["Forward", "NoDestination", "Transparent"]


class Forward:
    """A service that connects to ``target`` for every stream and relays between the two.

    Raises what ``connector`` raises.
    """

    accepts = Stream

    def __init__(self, connector: Service[Authority, Stream], target: Authority) -> None:
        check_fit(self, Authority, connector)
        self._connector = connector
        self._target = target
        self._at_once_connector = connects_at_once(connector)
        plain = type(self).__call__ is Forward.__call__ and self._at_once_connector is not None
        self.at_once = AtOnce(self, self._begin) if plain else None

    def _begin(self, visit: Visit) -> Session | None:
        assert self._at_once_connector is not None
        visit.stream.extensions.add(self._target)
        return begin_forward(visit, self._at_once_connector, self._target)

    async def __call__(self, stream: Stream, /) -> TunnelReport:
        begun = BegunForward.of(stream, stream.extensions.get(BegunForward))
        if begun is not None:
            return await relay(stream, await begun.finish())
        stream.extensions.add(self._target)
        target = Target(self._target.host, self._target.port, stream.extensions)
        return await relay(stream, await self._connector(target))


class Transparent:
    """A service that connects each stream to the address that its client meant: the stream's own local address, which
    is the original destination where a listener serves prefixes, or a trusted PROXY header said one.

    Raises what ``connector`` raises, which judges that address by the egress policy as any other; and
    :class:`NoDestination` for a stream that has none.
    """

    accepts = Stream

    def __init__(self, connector: Service[Authority, Stream]) -> None:
        check_fit(self, Authority, connector)
        self._connector = connector

    async def __call__(self, stream: Stream, /) -> TunnelReport:
        local = local_address(stream)
        if local is None:
            raise NoDestination("the client of a Unix socket has no original destination")
        target = Authority(local.ip, local.port)
        stream.extensions.add(target)
        return await relay(stream, await self._connector(Target(target.host, target.port, stream.extensions)))


class NoDestination(RamaError):
    """A stream does not say where its client meant to connect."""

    kind = "no_destination"

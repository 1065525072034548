"""Everything to one target, or to where each client meant to connect."""

from __future__ import annotations

from ..core.address import Authority
from ..core.client import local_address
from ..core.errors import RamaError
from ..core.service import Service, check_fit
from ..core.stream import Stream
from ..core.target import Target
from ..relay import TunnelReport, relay

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

    async def __call__(self, stream: Stream, /) -> TunnelReport:
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

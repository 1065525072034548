"""Everything to one target."""

from __future__ import annotations

from ..core.address import Authority
from ..core.service import Service, check_fit
from ..core.stream import Stream
from ..relay import TunnelReport, relay

__all__ = ["Forward"]


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
        return await relay(stream, await self._connector(self._target))

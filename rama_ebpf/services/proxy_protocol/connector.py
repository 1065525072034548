"""PROXY protocol on the way out: tell the upstream whom a connection is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ...core.address import Authority
from ...core.client import HasExtensions, client_address, local_address
from ...core.service import Service, check_fit
from ...core.stream import Stream
from ...core.target import Target
from .header import Command, Tlv, encode_v1, encode_v2

__all__ = ["ProxyProtocolConnector"]


class ProxyProtocolConnector:
    """Connects by ``connector`` and sends a PROXY header of ``version`` first.

    It is a connector itself: the header speaks for the client that a :class:`~rama_ebpf.core.target.Target` carries, as
    protocol servers call it. Where targets carry none, a connector is made per client: ``bind(stream)`` or
    ``bind(request)``. Connections must not be shared between clients. ``checksum`` (version 2) adds a CRC32c,
    ``tlvs`` computes extensions.
    """

    accepts = Authority

    def __init__(
        self,
        connector: Service[Authority, Stream],
        *,
        version: Literal[1, 2] = 2,
        checksum: bool = True,
        tlvs: Callable[[HasExtensions], tuple[Tlv, ...]] = lambda _: (),
    ) -> None:
        check_fit(self, Authority, connector)
        self._connector = connector
        self._version = version
        self._checksum = checksum
        self._tlvs = tlvs

    async def __call__(self, target: Authority, /) -> Stream:
        return await self.bind(target if isinstance(target, Target) else Target(target.host, target.port))(target)

    def bind(self, client: HasExtensions) -> Service[Authority, Stream]:
        """Return a connector whose connections are for ``client``. If its addresses are not known the header says
        that the connection is our own (LOCAL; version 1: UNKNOWN)."""

        async def connect(target: Authority) -> Stream:
            stream = await self._connector(target)
            try:
                await stream.write(self._header(client))
            except BaseException:
                stream.abort()
                raise
            return stream

        return connect

    def _header(self, client: HasExtensions) -> bytes:
        source, destination = client_address(client), local_address(client)
        if self._version == 1:
            return encode_v1(source, destination)
        command = Command.LOCAL if source is None or destination is None else Command.PROXY
        return encode_v2(source, destination, tlvs=self._tlvs(client), command=command, checksum=self._checksum)

"""Proxy chain: reaching targets through other proxies."""

from __future__ import annotations

from collections.abc import Callable

from .address import Authority
from .service import Service
from .stream import Stream

__all__ = ["Hop", "ProxyChainLayer"]

Hop = Callable[[Service[Authority, Stream]], Service[Authority, Stream]]
"""Makes of a connector one that goes on from there, for example ``lambda inner: Socks5Client(inner, proxy)``."""


class ProxyChainLayer:
    """Around a connector: reaches every target through these ``hops``, the one nearest to us first.

    The last hop resolves the target's name, and the connector inside sees the first hop's address only. So egress
    policy judges that address: put a :class:`~rama_ebpf.layers.hijack.FilterLayer` outside to say which targets may
    be asked for.
    """

    accepts = Authority

    def __init__(self, *hops: Hop) -> None:
        if not hops:
            raise ValueError("a chain needs at least one hop")
        self._hops = hops

    def __call__(self, inner: Service[Authority, Stream]) -> Service[Authority, Stream]:
        for hop in self._hops:
            inner = hop(inner)
        return inner

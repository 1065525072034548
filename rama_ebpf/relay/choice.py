"""Which relay a tunnel gets."""

from __future__ import annotations

from ..core.address import SocketAddress
from ..core.stream import SocketStream
from .tunnel import RelayKind, RelayOptions

__all__ = ["choose"]


def choose(client: SocketStream, upstream: SocketStream, options: RelayOptions) -> tuple[RelayKind, str]:
    """Return the relay that is wanted for two sockets, and why.

    ``auto`` wants the kernel's relay only where no segment is lost on the way: it is the one way that is not plain
    TCP, so it is kept to where no peer has reason to send a byte twice.
    """
    if options.kind is not RelayKind.AUTO:
        return options.kind, "configured"
    places = {_place(client, options), _place(upstream, options)}
    if None in places:
        return RelayKind.AUTO, "auto: a peer is neither on this host nor in a lossless network"
    return RelayKind.SOCKMAP, "auto: both peers are " + " or ".join(sorted(place for place in places if place))


def _place(stream: SocketStream, options: RelayOptions) -> str | None:
    peer, local = stream.peer, stream.local
    if peer is None or local is None:
        return None
    if peer.ip.is_loopback or peer.ip == local.ip:
        return "on this host"
    return "in a lossless network" if _within(peer, options) else None


def _within(address: SocketAddress, options: RelayOptions) -> bool:
    return any(address.ip.version == network.version and address.ip in network for network in options.lossless)

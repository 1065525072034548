"""Which relay a tunnel gets."""

from __future__ import annotations

from ..core.address import SocketAddress
from ..core.stream import SocketStream
from .tunnel import RelayKind, RelayOptions

__all__ = ["choose"]


def choose(
    client: SocketStream, upstream: SocketStream, options: RelayOptions, *, sockmap: bool
) -> tuple[RelayKind, str]:
    """Return the relay for two sockets, and why. ``sockmap`` says whether the kernel's relay is there.

    ``auto`` takes the kernel's relay only where no segment is lost on the way, because it must reset a flow whose
    retransmissions it cannot follow.
    """
    if options.kind is not RelayKind.AUTO:
        return options.kind, "configured"
    if not sockmap:
        return RelayKind.AUTO, "auto"
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

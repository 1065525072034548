"""Which relay a tunnel gets."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.address import SocketAddress, is_loopback
from ..core.stream import SocketStream
from .tunnel import RelayKind, RelayOptions

__all__ = ["Choice", "choose"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The relay that a tunnel begins with, and why; ``rises`` if the kernel may take it over when it has shown that
    it talks in small messages."""

    kind: RelayKind
    why: str
    rises: bool = False


def choose(client: SocketStream, upstream: SocketStream, options: RelayOptions) -> Choice:
    """Return the relay that is wanted for two sockets.

    ``auto`` wants the kernel's relay only where no segment is lost on the way: it is the one way that is not plain
    TCP, so it is kept to where no peer has reason to send a byte twice. And only for tunnels that talk: bulk is
    quicker by splice(2), and a short tunnel is over before it pays.
    """
    if options.kind is not RelayKind.AUTO:
        return Choice(options.kind, "configured")
    places = {_place(client, options), _place(upstream, options)}
    if None in places:
        return Choice(RelayKind.AUTO, "auto: a peer is neither on this host nor in a lossless network")
    where = " or ".join(sorted(place for place in places if place))
    return Choice(RelayKind.AUTO, f"auto: both peers are {where}", rises=True)


def _place(stream: SocketStream, options: RelayOptions) -> str | None:
    peer, local = stream.peer, stream.local
    if peer is None or local is None:
        return None
    if is_loopback(peer.ip) or peer.ip == local.ip:
        return "on this host"
    return "in a lossless network" if _within(peer, options) else None


def _within(address: SocketAddress, options: RelayOptions) -> bool:
    return any(address.ip.version == network.version and address.ip in network for network in options.lossless)

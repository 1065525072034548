"""Which relay a tunnel gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..core.address import SocketAddress, is_loopback
from ..core.socket_stream import SocketStream
from .options import RelayKind, RelayOptions

__all__ = ["Choice", "choose"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The relay that a tunnel begins with, and why; ``promotes_to`` the one that may take it over when it has shown
    that it talks in small messages."""

    kind: RelayKind
    why: str
    promotes_to: RelayKind | None = None


def choose(client: SocketStream, upstream: SocketStream, options: RelayOptions) -> Choice:
    """Return the relay that is wanted for two sockets.

    ``auto`` wants the kernel's relay only where no segment is lost on the way: it is the one way that is not plain
    TCP, so it is kept to where no peer has reason to send a byte twice. And only for tunnels that talk: bulk is
    quicker by splice(2), and a short tunnel is over before it pays.
    """
    if options.kind is not RelayKind.AUTO:
        return _CONFIGURED[options.kind]
    places = _place(client, options), _place(upstream, options)
    if _ELSEWHERE in places:
        return _USERSPACE
    return _PROMOTABLE[places]


_HERE: Final = "on this host"
_LOSSLESS: Final = "in a lossless network"
_ELSEWHERE: Final = "elsewhere"

_CONFIGURED: Final = {kind: Choice(kind, "configured") for kind in RelayKind}
_USERSPACE: Final = Choice(RelayKind.AUTO, "auto: a peer is neither on this host nor in a lossless network")
_PROMOTABLE: Final = {
    (client, upstream): Choice(
        RelayKind.AUTO,
        f"auto: both peers are {' or '.join(sorted({client, upstream}))}",
        promotes_to=RelayKind.SOCKMAP,
    )
    for client in (_HERE, _LOSSLESS)
    for upstream in (_HERE, _LOSSLESS)
}


def _place(stream: SocketStream, options: RelayOptions) -> str:
    peer = stream.peer
    if peer is None:
        return _ELSEWHERE
    if is_loopback(peer.ip):
        return _HERE
    local = stream.local
    if local is None:
        return _ELSEWHERE
    if peer.ip == local.ip:
        return _HERE
    return _LOSSLESS if _within(peer, options) else _ELSEWHERE


def _within(address: SocketAddress, options: RelayOptions) -> bool:
    return any(address.ip.version == network.version and address.ip in network for network in options.lossless)

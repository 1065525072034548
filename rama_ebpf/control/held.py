"""Addresses that the service manager holds while no server runs, so that a restart refuses nobody.

A server that stops leaves a socket for each address in the manager's descriptor store (sd_pid_notify_with_fds(3),
``FDSTORE=1``). It listens and is sealed: what comes for it is dropped, so a client's SYN gets no answer, and comes
again after a second. The next server, to which the manager gives them (sd_listen_fds(3)), binds its own sockets beside
them, and lets go of these when it serves. No connection is ever made on a held socket, so nothing is lost with it, and
no gate has to guard it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable
from typing import Final

from ..core.address import SocketAddress
from ..kernel import sock_diag
from ..kernel.seal import seal
from ..process.service_manager import kept_by_manager, notify

__all__ = ["HANDSHAKE_SECONDS", "HeldAddresses", "hold"]

log = logging.getLogger("rama_ebpf")

_NAME: Final = "rama-ebpf"
HANDSHAKE_SECONDS: Final = 1.0
"""For how long a server that stops accepts what has begun before its addresses were held."""


class HeldAddresses:
    """Those that were held for this server."""

    def __init__(self, sockets: Iterable[socket.socket] = ()) -> None:
        self._sockets = {SocketAddress.from_sockaddr(sock.getsockname()): sock for sock in sockets}
        for sock in self._sockets.values():
            seal(sock)
        self.cookies = frozenset(map(sock_diag.cookie_of, self._sockets.values()))
        """Of their sockets, also when they are let go of: the manager may have them for a moment more."""

    @classmethod
    def of_manager(cls) -> HeldAddresses:
        """Take those that the service manager has given to this process. Raises OSError."""
        held = cls(kept_by_manager(_NAME))
        if held._sockets:
            log.info("the service manager has held %s", ", ".join(map(str, held._sockets)))
        return held

    def __contains__(self, address: object) -> bool:
        return address in self._sockets

    def at(self, address: SocketAddress) -> tuple[socket.socket, ...]:
        """Return the socket that holds an address, if one does."""
        sock = self._sockets.get(address)
        return () if sock is None else (sock,)

    def let_go(self) -> None:
        """Our own sockets listen there: close these, and have the manager forget them."""
        if self._sockets:
            while self._sockets:
                self._sockets.popitem()[1].close()
            notify(f"FDSTOREREMOVE=1\nFDNAME={_NAME}")

    def close(self) -> None:
        """Close ours; the manager goes on to hold them."""
        while self._sockets:
            self._sockets.popitem()[1].close()


def hold(sock: socket.socket) -> bool:
    """Have the service manager hold the address of a sealed socket that listens; return whether it was told."""
    return "NOTIFY_SOCKET" in os.environ and notify(f"FDSTORE=1\nFDNAME={_NAME}", fds=(sock.fileno(),))

"""What a service manager is told, sd_notify(3): one datagram to the socket that it names, with descriptors that it is
to keep; and what it has kept for us, sd_listen_fds(3)."""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import Mapping, Sequence

from ..services.fd_passing import sockets_of_service_manager

__all__ = ["kept_by_manager", "notify"]

log = logging.getLogger("rama_ebpf.supervisor")


def notify(state: str, environ: Mapping[str, str] = os.environ, *, fds: Sequence[int] = ()) -> bool:
    """Tell it ``state``, as ``READY=1`` or ``MAINPID=4711``, with descriptors; does nothing where nobody wants to know.
    Return whether it was told."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendmsg([state.encode()], ancillary, 0, address)
    except OSError as error:
        log.warning("the service manager cannot be told %s: %s", state.partition("\n")[0], error)
        return False
    return True


def kept_by_manager(name: str, environ: Mapping[str, str] = os.environ) -> list[socket.socket]:
    """Return the sockets that it has kept for us under a name (``FDNAME``); others that it has opened for us are left
    to whoever wants them. Raises OSError."""
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    if name not in names:
        return []
    found = []
    for sock, its in zip(sockets_of_service_manager(environ), names, strict=False):
        if its == name:
            found.append(sock)
        else:
            sock.detach()
    return found

"""Processes that hold tunnels of the wire relay: where they are reached, also by who has not started them.

Each has a Unix socket (``SOCK_SEQPACKET``) below the instance's run directory, to which only root may connect. It
listens there itself, so the kernel tells who it is (``SO_PEERCRED``, unix(7)). A socket to which nobody listens is what
an ended process has left.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Final

from .instance import Instance

__all__ = ["Entrance", "end_holders", "entrances", "reach"]

_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred
_END_SECONDS: Final = 3.0
_PACKET_BYTES: Final = 1 << 16


class Entrance:
    """The socket of a process that is about to be started. ``sock`` is bound, for that process to listen on."""

    def __init__(self, instance: Instance) -> None:
        """Raises OSError."""
        directory = _directory(instance)
        instance.make_run_dir()
        directory.mkdir(mode=0o700, exist_ok=True)
        _sweep(directory)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._path = directory / f"{os.getpid()}-{time.monotonic_ns()}.new"
        try:
            self.sock.bind(str(self._path))
            self._path.chmod(0o600)
        except BaseException:
            self.sock.close()
            raise

    def open(self) -> None:
        """Its process listens: let others find it."""
        found = self._path.with_suffix(".sock")
        self._path.rename(found)
        self._path = found

    def close(self) -> None:
        """Leave it to its process."""
        self.sock.close()

    def remove(self) -> None:
        """Its process has ended."""
        self.close()
        self._path.unlink(missing_ok=True)


def _directory(instance: Instance) -> Path:
    return instance.run_dir / "wire"


def _sweep(directory: Path) -> None:
    """Remove what servers have left that were killed while their processes began."""
    for path in directory.glob("*.new"):
        if not Path(f"/proc/{path.stem.partition('-')[0]}").exists():
            path.unlink(missing_ok=True)


def entrances(instance: Instance) -> list[Path]:
    """Return where processes are reached that hold tunnels of an instance, the oldest first. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(_directory(instance).glob("*.sock"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return []


def reach(path: Path) -> socket.socket | None:
    """Connect to the process behind an entrance; None, and the entrance is removed, if there is none. Raises
    OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(_END_SECONDS)
        sock.connect(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        sock.close()
        path.unlink(missing_ok=True)
        return None
    except BaseException:
        sock.close()
        raise
    return sock


def end_holders(instance: Instance) -> None:
    """Have all processes that hold tunnels of an instance reset them and end; kill who does not within 3 s. Raises
    OSError."""
    for path in entrances(instance):
        sock = reach(path)
        if sock is None:
            continue
        with sock:
            pid, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                try:
                    with contextlib.suppress(OSError):  # it has just ended, or does not listen: then it is killed
                        sock.send(json.dumps({"end": True}).encode())
                    if not select.select([handle], [], [], _END_SECONDS)[0]:
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        path.unlink(missing_ok=True)

"""Unix sockets: listening on them, connecting to them, and who is at the other end. The TCP server serves them too."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
from dataclasses import dataclass

from ..core.address import Authority
from ..core.errors import StackError
from ..core.service import Output, Service
from ..core.socket_stream import SocketStream
from ..core.stream import Stream
from .connect import ConnectError

__all__ = ["PeerCredentials", "PeerCredentialsLayer", "UnixConnector", "bind_unix"]


def _address(path: str) -> str:
    return "\0" + path[1:] if path.startswith("@") else path


def bind_unix(path: str, *, mode: int = 0o660, group: int | None = None, backlog: int = 4096) -> socket.socket:
    """Return a listening non-blocking Unix stream socket at ``path``; ``@name`` is in the abstract namespace.

    A socket file that nobody listens on any more is replaced; anything else at the path is left alone and OSError
    is raised, naming it. ``mode`` and ``group`` (a gid) say who may connect.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if not path.startswith("@"):
            _remove_stale(path)
        old = os.umask(0o777)  # nobody may connect before mode and group are set
        try:
            sock.bind(_address(path))
        finally:
            os.umask(old)
        if not path.startswith("@"):
            if group is not None:
                os.chown(path, -1, group)
            os.chmod(path, mode)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {path}: {error.strerror}") from error
    return sock


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "there is something else that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
    raise OSError(errno.EADDRINUSE, "another process listens there")


@dataclass(frozen=True)
class UnixConnector:
    """A service to a connected stream at one ``path``, whatever is asked for: an upstream behind a Unix socket.

    ``timeout`` is in seconds. Raises :class:`ConnectError`.
    """

    path: str
    timeout: float = 10.0

    accepts = Authority

    async def __call__(self, target: Authority, /) -> Stream:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    try:
                        sock.connect(_address(self.path))
                        return SocketStream(sock)
                    except BlockingIOError:
                        # A full backlog: unlike TCP there is nothing to wait on (unix(7)), so ask again in a moment.
                        await asyncio.sleep(0.01)
        except OSError as error:
            sock.close()
            number = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno or errno.EIO
            raise ConnectError(number, f"cannot connect to {self.path}: {os.strerror(number)}") from error
        except BaseException:
            sock.close()
            raise


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """The process at the other end of a Unix socket when it connected (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, sock: socket.socket) -> PeerCredentials:
        """Ask the kernel."""
        return cls(*struct.unpack("iii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


class PeerCredentialsLayer:
    """Adds :class:`PeerCredentials` to streams over Unix sockets. Raises :class:`StackError` for any other stream."""

    accepts = Stream

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def serve(stream: Stream, /) -> Output:
            if not isinstance(stream, SocketStream) or stream.socket.family != socket.AF_UNIX:
                raise StackError("PeerCredentialsLayer needs a stream over a Unix socket")
            stream.extensions.add(PeerCredentials.of(stream.socket))
            return await inner(stream)

        return serve

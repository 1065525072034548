"""The control socket: one JSON request a line, one JSON answer a line, on a Unix socket that only its owner may open.

A method may also answer with a stream: one line ``{"result": …}`` after the other until the caller closes.

Request: ``{"method": "add", "params": {…}}``. Answer: ``{"result": {…}}``, or ``{"error": "text"}`` for a mistake of
the caller's. Lines are at most 64 KiB; a connection that is idle for 10 s is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from ..core.errors import RamaError
from ..kernel.suspended import is_stopped, stopped_hint
from ..policy.journal import acting_for
from ..policy.rule import PolicyError
from .api import Json
from .enforced import InForce

__all__ = ["ControlServer", "ControlUnavailable", "RequestFailed", "call", "follow"]

log = logging.getLogger(__name__)

_MAX_LINE: Final = 64 * 1024
_MAX_ANSWER: Final = 64 * 1024 * 1024
_IDLE_SECONDS: Final = 10.0
_BACKLOG: Final = 100
_UCRED: Final = struct.Struct("=iII")  # unix(7): pid, uid, gid

Handler = Callable[[str, Mapping[str, object]], Json]
Stream = Callable[[Mapping[str, object]], AsyncGenerator[Json, None]]


class ControlUnavailable(OSError):
    """No server answers on the control socket."""


class RequestFailed(RamaError):
    """The server could not do what it was asked, or not all of it; the text says what is in force."""

    kind = "request_failed"


class ControlServer:
    """Serves ``handler(method, params)`` on a Unix socket at ``path`` (mode 0600; a stale file is replaced).

    ``streams`` are the methods, by name, that answer with a stream.
    """

    def __init__(self, path: Path, handler: Handler, streams: Mapping[str, Stream] | None = None) -> None:
        self._path = path
        self._handler = handler
        self._streams = streams or {}
        self._server: asyncio.Server | None = None
        self._listener: socket.socket | None = None
        self.owns = True
        """Whether the path is ours to remove: not while another server answers there, or may have to again."""

    @property
    def listener(self) -> socket.socket:
        """The listening socket, once :meth:`start` has made it."""
        assert self._listener is not None
        return self._listener

    async def start(self, listener: socket.socket | None = None) -> None:
        """Start to listen, or go on with the socket of another server. Raises OSError."""
        if listener is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            previous = os.umask(0o177)
            try:
                listener.bind(str(self._path))
                listener.listen(_BACKLOG)
            except BaseException:
                listener.close()
                raise
            finally:
                os.umask(previous)
        listener.setblocking(False)
        self._listener = listener
        await self.resume()

    def pause(self) -> None:
        """Answer nobody who comes from now on: they wait, for us or for another server."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def resume(self) -> None:
        """Answer who comes."""
        if self._server is None and self._listener is not None:
            self._server = await asyncio.start_unix_server(self._serve, sock=self._listener.dup(), limit=_MAX_LINE)

    async def stop(self) -> None:
        """Stop listening, and remove the socket if it is ours."""
        self.pause()
        if self._listener is not None and self.owns:
            self._path.unlink(missing_ok=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(credentials)
        try:
            while True:
                async with asyncio.timeout(_IDLE_SECONDS):
                    line = await reader.readline()
                if not line:
                    return
                stream, params = self._stream(line)
                if stream is not None:
                    await self._pour(stream(params), reader, writer)
                    return
                # In a thread: loading a set may take seconds, and reading its feeds longer.
                with acting_for(uid, pid):
                    answer = await asyncio.to_thread(self._answer, line)
                writer.write(json.dumps(answer).encode() + b"\n")
                async with asyncio.timeout(_IDLE_SECONDS):
                    await writer.drain()
        except (TimeoutError, ConnectionError, ValueError) as error:
            log.info("control connection ended: %s", error or type(error).__name__)
        finally:
            writer.close()

    def _stream(self, line: bytes) -> tuple[Stream | None, Mapping[str, object]]:
        with contextlib.suppress(json.JSONDecodeError):  # _answer says it
            request = json.loads(line)
            if isinstance(request, dict) and isinstance(request.get("params", {}), dict):
                return self._streams.get(str(request.get("method"))), request.get("params", {})
        return None, {}

    async def _pour(
        self, stream: AsyncGenerator[Json, None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Write a stream until the caller closes its end."""
        pouring = asyncio.create_task(_pour(stream, writer))
        closed = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait((pouring, closed), return_when=asyncio.FIRST_COMPLETED)
            if pouring.done():
                pouring.result()
        finally:
            for task in (pouring, closed):
                task.cancel()
            await asyncio.gather(pouring, closed, return_exceptions=True)

    def _answer(self, line: bytes) -> Json:
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or not isinstance(request.get("params", {}), dict):
                raise PolicyError("a request is an object with method and params")
            return {"result": self._handler(str(request.get("method")), request.get("params", {}))}
        except (PolicyError, json.JSONDecodeError, KeyError) as error:
            return {"error": str(error)}
        except InForce as error:
            return {"error": str(error), "failed": True}
        except OSError as error:
            log.exception("control request failed")
            return {"error": f"{type(error).__name__}: {error}", "failed": True}


async def _pour(stream: AsyncGenerator[Json, None], writer: asyncio.StreamWriter) -> None:
    async with contextlib.aclosing(stream) as lines:
        try:
            async for line in lines:
                writer.write(json.dumps({"result": line}).encode() + b"\n")
                async with asyncio.timeout(_IDLE_SECONDS):
                    await writer.drain()
        except PolicyError as error:
            writer.write(json.dumps({"error": str(error)}).encode() + b"\n")


def follow(path: Path, method: str, params: Mapping[str, object]) -> Iterator[Json]:
    """Ask the server at ``path`` for a stream and yield its lines until either end closes. Raises like :func:`call`."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            _connect(sock, path)
            sock.sendall(json.dumps({"method": method, "params": dict(params)}).encode() + b"\n")
            with sock.makefile("rb") as lines:
                while line := lines.readline(_MAX_LINE):
                    yield _result(line)
    except OSError as error:
        raise ControlUnavailable(error.errno, f"no server answers at {path}: {error.strerror or error}") from error


def call(path: Path, method: str, params: Mapping[str, object], *, timeout: float = 10.0) -> Json:
    """Ask the server at ``path`` and return its result.

    Raises :class:`ControlUnavailable` if none answers, :class:`PolicyError` with the server's text for a mistake, and
    :class:`RequestFailed` with it where the server could not do all of it.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            _connect(sock, path)
            sock.sendall(json.dumps({"method": method, "params": dict(params)}).encode() + b"\n")
            with sock.makefile("rb") as lines:
                line = lines.readline(_MAX_ANSWER)
    except OSError as error:
        raise ControlUnavailable(error.errno, f"no server answers at {path}: {error.strerror or error}") from error
    if not line:
        raise ControlUnavailable(None, f"the server at {path} closed the connection")
    return _result(line)


def _connect(sock: socket.socket, path: Path) -> None:
    """A server that is stopped would take the connection, and answer nothing."""
    sock.connect(str(path))
    pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if is_stopped(pid):
        raise OSError(errno.ETIMEDOUT, f"process {pid} listens there{stopped_hint(pid)}")


def _result(line: bytes) -> Json:
    answer = json.loads(line)
    if "error" in answer:
        raise RequestFailed(answer["error"]) if answer.get("failed") else PolicyError(answer["error"])
    result = answer["result"]
    assert isinstance(result, dict)
    return result

"""Reading a feed, in a child process of its own.

What comes from the network, or out of a file, is unpacked and parsed there, by a process that has given up its
privileges; where it connects to it has to ask for (:mod:`.feed_room`). The one deadline for everything, from the first
DNS query to the last line, is kept by ending the child, so a server that hangs, drips or redirects in circles costs
nothing else, and a stop ends it at once. What the child says lands in memory whose size is bounded for it before it
reads anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

import msgspec

from ..core.errors import PolicyDenied
from ..core.interpreter import module_command
from .feed import FeedContent
from .feed_record import decode
from .feed_room import ASKS, Ask, FeedRoom, Grants, NoRoom, judge

__all__ = ["Answer", "FetchError", "Fetcher"]

_CHILD: Final = "rama_ebpf.policy.fetch_child"
_WHY_BYTES: Final = 64 * 1024
_ASK_BYTES: Final = 64 * 1024
PLAIN: Final[Mapping[str, str]] = {"format": "plain"}


class FetchError(Exception):
    """A feed could not be read; the text says why. ``retry_after`` is what its server said, in seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Answer:
    """``content`` is None if the server says that nothing has changed. ``validators`` are what to ask with next
    time."""

    content: FeedContent | None
    validators: dict[str, str]


class Fetcher:
    """Reads feeds, with children in ``room``; thread-safe."""

    def __init__(self, room: FeedRoom | None = None) -> None:
        self._room = room or NoRoom()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._cancelled = False

    def cancel(self) -> None:
        """End all children at once, and refuse to begin others: for a server that stops."""
        with self._lock:
            self._cancelled = True
            for child in self._children:
                child.kill()

    def get(
        self,
        url: str,
        validators: Mapping[str, str],
        *,
        timeout: float,
        max_size: int,
        max_bad: float = 0.05,
        format: Mapping[str, str] = PLAIN,
    ) -> Answer:
        """GET a URL: at most ``max_size`` bytes, also when unpacked, fetched and parsed within ``timeout`` seconds.

        ``format`` has the name and the options of one (:mod:`.feed_formats`). ``validators`` are those of the last
        :class:`Answer` (RFC 9110 section 8.8), empty to get it in any case. Raises
        :class:`FetchError`, whose text holds nothing of what was read.
        """
        return self._ask(
            {"url": url, "validators": dict(validators), "format": dict(format)}, timeout, max_size, max_bad
        )

    def read(
        self, file: int, *, timeout: float, max_size: int, max_bad: float = 0.05, format: Mapping[str, str] = PLAIN
    ) -> Answer:
        """Read a file by its descriptor, likewise; :class:`FetchError` quotes its lines."""
        return self._ask({"file": file, "format": dict(format)}, timeout, max_size, max_bad, (file,))

    def _ask(
        self, what: Mapping[str, object], timeout: float, max_size: int, max_bad: float, fds: Sequence[int] = ()
    ) -> Answer:
        request = {**what, "timeout": timeout, "max_size": max_size, "max_bad": max_bad}
        with open(os.memfd_create("feed"), "w+b") as told, open(os.memfd_create("why"), "w+b") as why:
            code = self._run(request, told, why, timeout, fds)
            if code != 0:
                why.seek(0)
                raise _failure(why.read(_WHY_BYTES).decode(errors="replace").strip().splitlines(), code)
            told.seek(0)
            record = told.read()
        try:
            content, head = decode(record)
            validators = {str(name): str(value) for name, value in head["validators"].items()}
            return Answer(None if head["unchanged"] else content, validators)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FetchError(f"the child process answered nonsense: {error}") from error

    def _run(
        self, request: Mapping[str, object], told: IO[bytes], why: IO[bytes], timeout: float, fds: Sequence[int]
    ) -> int:
        deadline = time.monotonic() + timeout
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                child = self._start(theirs.fileno(), told, why, fds)
            try:
                with self._room.admit(child.pid) as grants:
                    try:
                        with contextlib.suppress(ConnectionError):  # it has ended, and says why elsewhere
                            ours.sendall(json.dumps(request).encode())
                            self._answer(ours, str(request.get("url", "")), grants, deadline)
                        child.wait(max(0.0, deadline - time.monotonic()))
                    except (subprocess.TimeoutExpired, TimeoutError):
                        raise FetchError(f"not there within {timeout:g} s") from None
                    finally:  # before its cgroup goes
                        child.kill()
                        child.wait()
            except OSError as error:
                raise FetchError(f"the child process cannot be confined: {error}") from error
            finally:
                child.kill()
                child.wait()
                with self._lock:
                    self._children.discard(child)
        return child.returncode

    def _start(self, channel: int, told: IO[bytes], why: IO[bytes], fds: Sequence[int]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._cancelled:
                raise FetchError("the server stops")
            try:
                child = subprocess.Popen(
                    module_command(_CHILD, str(channel)),
                    stdin=subprocess.DEVNULL,
                    stdout=told,
                    stderr=why,
                    cwd="/",
                    pass_fds=(channel, *fds),
                    process_group=0,  # a terminal's Ctrl-C is for us alone
                )
            except OSError as error:
                raise FetchError(f"cannot start a child process: {error}") from error
            self._children.add(child)
        return child

    def _answer(self, channel: socket.socket, url: str, grants: Grants, deadline: float) -> None:
        """Answer what the child asks until it closes its end. Raises TimeoutError, and :class:`FetchError` for
        nonsense."""
        for _ in range(ASKS):
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            if not (data := channel.recv(_ASK_BYTES)):
                return
            try:
                ask = msgspec.json.decode(data, type=Ask)
            except msgspec.DecodeError as error:
                raise FetchError(f"the child process asks nonsense: {error}") from error
            refusal = ""
            try:
                if ask.listener is not None:
                    grants.follow(ask.listener)
                else:
                    grants.allow(judge(ask, url), ask.port)
            except (PolicyDenied, OSError, ValueError) as error:
                refusal = str(error)
            channel.sendall(json.dumps({"refusal": refusal}).encode())
        raise FetchError(f"the child process asks more than {ASKS} times where it may connect to")


def _failure(lines: Sequence[str], code: int) -> FetchError:
    """What the child's last words say: JSON of its own, or whatever Python wrote when it could not go on."""
    if not lines:
        return FetchError(f"the child process ended with {code}")
    try:
        said = json.loads(lines[-1])
        retry_after = said["retry_after"]
        return FetchError(str(said["error"]), None if retry_after is None else float(retry_after))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return FetchError(f"the child process ended with {code}: {lines[-1][:200]}")

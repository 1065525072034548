"""Reading a feed, in a child process of its own.

What comes from the network, or out of a file, is unpacked and parsed there, by a process that has given up its
privileges. The one deadline for everything, from the first DNS query to the last line, is kept by ending the child, so
a server that hangs, drips or redirects in circles costs nothing else, and a stop ends it at once. What the child says
lands in memory whose size is bounded for it before it reads anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

from .feed import FeedContent
from .feed_record import decode

__all__ = ["Answer", "FetchError", "Fetcher"]

_CHILD: Final = "rama_ebpf.policy.fetch_child"
_WHY_BYTES: Final = 64 * 1024


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
    """Reads feeds; thread-safe."""

    def __init__(self) -> None:
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
        self, url: str, validators: Mapping[str, str], *, timeout: float, max_size: int, max_bad: float = 0.05
    ) -> Answer:
        """GET a URL: at most ``max_size`` bytes, also when unpacked, fetched and parsed within ``timeout`` seconds.

        ``validators`` are those of the last :class:`Answer` (RFC 9110 section 8.8), empty to get it in any case. Raises
        :class:`FetchError`, whose text holds nothing of what was read.
        """
        return self._ask({"url": url, "validators": dict(validators)}, timeout, max_size, max_bad)

    def read(self, file: int, *, timeout: float, max_size: int, max_bad: float = 0.05) -> Answer:
        """Read a file by its descriptor, likewise; :class:`FetchError` quotes its lines."""
        return self._ask({"file": file}, timeout, max_size, max_bad, (file,))

    def _ask(
        self, what: Mapping[str, object], timeout: float, max_size: int, max_bad: float, fds: Sequence[int] = ()
    ) -> Answer:
        request = json.dumps({**what, "timeout": timeout, "max_size": max_size, "max_bad": max_bad})
        with open(os.memfd_create("feed"), "w+b") as told, open(os.memfd_create("why"), "w+b") as why:
            code = self._run(request.encode(), told, why, timeout, fds)
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

    def _run(self, request: bytes, told: IO[bytes], why: IO[bytes], timeout: float, fds: Sequence[int]) -> int:
        with self._lock:
            if self._cancelled:
                raise FetchError("the server stops")
            try:
                child = subprocess.Popen(
                    [sys.executable, "-m", _CHILD],
                    stdin=subprocess.PIPE,
                    stdout=told,
                    stderr=why,
                    cwd="/",
                    pass_fds=fds,
                    process_group=0,  # a terminal's Ctrl-C is for us alone
                )
            except OSError as error:
                raise FetchError(f"cannot start a child process: {error}") from error
            self._children.add(child)
        try:
            child.communicate(request, timeout)
        except subprocess.TimeoutExpired:
            raise FetchError(f"not there within {timeout:g} s") from None
        finally:
            child.kill()
            child.wait()
            with self._lock:
                self._children.discard(child)
        return child.returncode


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

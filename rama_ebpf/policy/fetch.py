"""Getting a feed over HTTP, in a child process of its own.

What comes from the network is parsed and unpacked there, by a process that has given up its privileges. The one
deadline for everything, from the first DNS query to the last byte, is kept by ending the child, so a server that
hangs, drips or redirects in circles costs nothing else. What the child says lands in memory whose size is bounded for
it before it opens a connection.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Final

__all__ = ["Answer", "FetchError", "Fetcher"]

_CHILD: Final = "rama_ebpf.policy.fetch_child"
_WHY_BYTES: Final = 64 * 1024


class FetchError(Exception):
    """A URL could not be read; the text says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``data`` is unpacked, and None if the server says that nothing has changed. ``validators`` are what to ask with
    next time."""

    data: bytes | None
    validators: dict[str, str]


class Fetcher:
    """Gets URLs; thread-safe."""

    def __init__(self) -> None:
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._cancelled = False

    def cancel(self) -> None:
        """End all transfers at once, and refuse to begin others: for a server that stops."""
        with self._lock:
            self._cancelled = True
            for child in self._children:
                child.kill()

    def get(self, url: str, validators: Mapping[str, str], *, timeout: float, max_size: int) -> Answer:
        """GET a URL: at most ``max_size`` bytes, also when unpacked, within ``timeout`` seconds.

        ``validators`` are those of the last :class:`Answer` (RFC 9110 section 8.8), empty to get it in any case. Raises
        :class:`FetchError`.
        """
        request = json.dumps({"url": url, "validators": dict(validators), "timeout": timeout, "max_size": max_size})
        with open(os.memfd_create("feed"), "w+b") as told, open(os.memfd_create("why"), "w+b") as why:
            code = self._run(request.encode(), told, why, timeout)
            if code != 0:
                why.seek(0)
                lines = why.read(_WHY_BYTES).decode(errors="replace").strip().splitlines()
                raise FetchError(lines[-1] if lines else f"the child process ended with {code}")
            told.seek(0)
            head = told.readline()
            data = told.read()
        try:
            fields = json.loads(head)
            return Answer(None if fields["unchanged"] else data, dict(fields["validators"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FetchError(f"the child process answered nonsense: {error}") from error

    def _run(self, request: bytes, told: IO[bytes], why: IO[bytes], timeout: float) -> int:
        with self._lock:
            if self._cancelled:
                raise FetchError("the server stops")
            try:
                child = subprocess.Popen(
                    [sys.executable, "-m", _CHILD], stdin=subprocess.PIPE, stdout=told, stderr=why, cwd="/"
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

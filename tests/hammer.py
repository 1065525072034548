"""Clients that connect without pause, and what became of them."""

from __future__ import annotations

import abc
import socket
import threading
from collections.abc import Sequence
from typing import Self

from .lab import PATIENCE, Host

__all__ = ["Denied", "Hammer", "Served", "echoed"]


class Hammer(abc.ABC):
    """A thread in ``host`` for each source, from the beginning to the end of a ``with`` block."""

    def __init__(self, host: Host, sources: Sequence[str]) -> None:
        self._host = host
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._inside, args=(source,), daemon=True) for source in sources]

    def _inside(self, source: str) -> None:
        self._host.call(lambda: self._run(source))

    @abc.abstractmethod
    def _run(self, source: str) -> None:
        """Connect again and again until ``_stopping`` is set."""

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


class Denied(Hammer):
    """Connects from sources that are to be denied, again and again, and keeps who got in."""

    def __init__(self, host: Host, sources: Sequence[str], targets: Sequence[tuple[str, int]]) -> None:
        """Each source goes to the targets of its own family, in turn."""
        super().__init__(host, sources)
        self.got_in: list[str] = []
        self.tries = 0
        self.phase = ""
        """What happens meanwhile, to be named beside who got in."""
        self._targets = targets

    def _run(self, source: str) -> None:
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        targets = [(address, port) for address, port in self._targets if (":" in address) == (":" in source)]
        while not self._stopping.is_set():
            for target in targets:
                with socket.socket(family) as sock:
                    sock.settimeout(0.03)
                    try:
                        sock.bind((source, 0))
                        sock.connect(target)
                    except ConnectionRefusedError:
                        self._stopping.wait(0.002)
                    except OSError:
                        pass  # no answer, or the server has just gone
                    else:
                        self.got_in.append(f"{source} at {target[0]} port {target[1]} {self.phase}".rstrip())
                self.tries += 1


def echoed(host: Host, source: str, target: tuple[str, int], timeout: float = 5.0) -> str:
    """Have an echo server echo; return nothing, or what went wrong."""
    sock = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
    with sock:
        sock.settimeout(timeout * PATIENCE)
        try:
            sock.bind((source, 0))
            sock.connect(target)
        except OSError as error:
            return f"not connected: {error!r}"
        try:
            sock.sendall(b"hello")
            answer = sock.recv(5, socket.MSG_WAITALL)
        except OSError as error:
            return f"not served: {error!r}"
    return "" if answer == b"hello" else f"not served: {answer!r}"


class Served(Hammer):
    """Clients that are to be served: each has its words echoed, again and again."""

    def __init__(self, host: Host, sources: Sequence[str], target: tuple[str, int], timeout: float = 5.0) -> None:
        super().__init__(host, sources)
        self.served = 0
        self.failures: list[str] = []
        self._target = target
        self._timeout = timeout

    def _run(self, source: str) -> None:
        while not self._stopping.is_set():
            wrong = echoed(self._host, source, self._target, self._timeout)
            if wrong:
                self.failures.append(f"{source} {wrong}")
                self._stopping.wait(0.02)
            else:
                self.served += 1
                self._stopping.wait(0.005)

"""The listening sockets of a server: opened once, kept across reloads, and put under the gate."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from ..core.address import Endpoint, SocketAddress
from ..loader import Gate
from ..process import Listener
from ..services.tcp import BACKLOG, bind_tcp
from ..services.unix import bind_unix

__all__ = ["ListenAt", "Listeners"]


@dataclass(frozen=True, slots=True)
class ListenAt:
    """Where to listen, under a name. ``mode`` is that of a Unix socket's file."""

    name: str
    endpoint: Endpoint
    mode: int = 0o660


@dataclass(slots=True)
class _Open:
    sockets: tuple[socket.socket, ...]
    address: SocketAddress | None
    listens: bool = False


_Key = tuple[Endpoint, str]


def _key(at: ListenAt) -> _Key:
    # A reload may give an address another name: its sockets stay. Only where the kernel picks the port is the name
    # what tells two listeners apart.
    picked = at.endpoint.address is not None and at.endpoint.address.port == 0
    return at.endpoint, at.name if picked else ""


class Listeners:
    """What is open now. With a ``gate`` every TCP listener is under it."""

    def __init__(self, gate: Gate | None) -> None:
        self._gate = gate
        self._open: dict[_Key, _Open] = {}

    def want(self, wanted: Iterable[ListenAt], sockets: int) -> tuple[Listener, ...]:
        """Return listeners for all of ``wanted``; those that are open already stay as they are.

        A new TCP address gets ``sockets`` sockets, one a worker, so that each has an accept queue that outlives it. It
        is under the gate, and lets nobody in before :meth:`open`. Raises OSError naming the address, or ValueError if
        the gate is full; then no new one stays open.
        """
        wanted = list(wanted)
        opened: list[_Key] = []
        try:
            for at in wanted:
                if _key(at) not in self._open:
                    self._open[_key(at)] = self._listen(at, sockets)
                    opened.append(_key(at))
        except BaseException:
            for key in opened:
                self._close(key)
            raise
        return tuple(Listener(at.name, self._open[_key(at)].sockets) for at in wanted)

    def open(self) -> None:
        """Listen on what :meth:`want` has made since. The policy that is meant for it is in force by now. Raises
        OSError."""
        for entry in self._open.values():
            if entry.address is None or entry.listens:
                continue
            for sock in entry.sockets:
                sock.listen(BACKLOG)
            if self._gate is not None:
                self._gate.open_listener(entry.address, entry.sockets)
            entry.listens = True

    def keep(self, wanted: Iterable[ListenAt]) -> None:
        """Close all others. No worker may have their sockets any more: they leave the gate."""
        for key in self._open.keys() - set(map(_key, wanted)):
            self._close(key)

    def stop(self) -> None:
        """Close our own descriptors of all sockets. They stay under the gate, for workers may still have theirs."""
        for entry in self._open.values():
            for sock in entry.sockets:
                sock.close()

    def close(self) -> None:
        """Close all, and take them from under the gate."""
        self.keep(())

    def addresses(self) -> list[SocketAddress]:
        """The TCP addresses that are open now."""
        return [entry.address for entry in list(self._open.values()) if entry.address is not None and entry.listens]

    def described(self, wanted: Iterable[ListenAt]) -> list[dict[str, object]]:
        """What ``status`` needs to know: name, address, and the index in the gate's maps of those under it."""
        rows: list[dict[str, object]] = []
        for at in wanted:
            address = self._open[_key(at)].address
            row: dict[str, object] = {"name": at.name, "address": str(at.endpoint if address is None else address)}
            if self._gate is not None and address is not None:
                row["id"] = self._gate.listener_id(address)
            rows.append(row)
        return rows

    def accept_slots(self, wanted: Iterable[ListenAt]) -> dict[str, int]:
        """The first index in the map ``accepted`` of each listener under the gate, by name."""
        slots: dict[str, int] = {}
        for at in wanted:
            address = self._open[_key(at)].address
            if self._gate is not None and address is not None:
                slots[at.name] = self._gate.accept_slot(address)
        return slots

    def _listen(self, at: ListenAt, count: int) -> _Open:
        if at.endpoint.address is None:
            return _Open((bind_unix(at.endpoint.path, mode=at.mode),), None)
        sockets = _bind(at.endpoint.address, count)
        address = SocketAddress.from_sockaddr(sockets[0].getsockname())
        if self._gate is not None:
            try:
                self._gate.reserve_listener(sockets)
            except BaseException:
                for sock in sockets:
                    sock.close()
                raise
        return _Open(sockets, address)

    def _close(self, key: _Key) -> None:
        entry = self._open.pop(key)
        if self._gate is not None and entry.address is not None:
            self._gate.remove_listener(entry.address)
        for sock in entry.sockets:
            sock.close()
        path = key[0].path
        if path and not path.startswith("@"):
            with contextlib.suppress(FileNotFoundError):  # somebody has tidied up before us
                os.unlink(path)


def _bind(address: SocketAddress, count: int) -> tuple[socket.socket, ...]:
    host = str(address.ip)
    sockets = [bind_tcp(host, address.port, backlog=None, reuse_port=count > 1)]
    try:
        while len(sockets) < count:
            sockets.append(bind_tcp(host, sockets[0].getsockname()[1], backlog=None, reuse_port=True))
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return tuple(sockets)

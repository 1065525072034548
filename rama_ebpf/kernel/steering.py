"""The listeners of a gate: which addresses it guards, whether they are open, and the sockets that their connections go
to.

Each has an entry in the map ``listeners`` and slots in ``sockets``, a SOCKMAP: bpf/sockets.h says which slot a
connection belongs to.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.address import SocketAddress, mapped
from . import abi, bpf, sock_diag
from .gate_maps import GateMaps

__all__ = ["Steering"]


@dataclass(frozen=True, slots=True)
class _Listener:
    key: bytes
    id: int
    sockets: int
    is_open: bool = False


def _entry(listener: _Listener) -> bytes:
    state = abi.constants()["LISTENER_OPEN" if listener.is_open else "LISTENER_CLOSED"]
    return abi.LISTENER.pack(listener.id, listener.sockets, state)


class Steering:
    """What the programs are told of listeners. One thread at a time changes it."""

    def __init__(self, maps: GateMaps) -> None:
        self._maps = maps
        self._listeners: dict[SocketAddress, _Listener] = {}
        self._steered: dict[bytes, socket.socket] = {}

    def __iter__(self) -> Iterator[SocketAddress]:
        """The addresses that have an entry."""
        return iter(list(self._listeners))

    def adopt(self, listeners: Mapping[SocketAddress, Sequence[socket.socket]]) -> None:
        """Go on with the entries that another process has made for these addresses, and with what they are steered to.
        Raises KeyError for an address that has none."""
        found = dict(bpf.map_lookup_batch(self._maps["listeners"], abi.LISTENER_KEY.size, abi.LISTENER.size))
        is_open = abi.constants()["LISTENER_OPEN"]
        self._listeners.clear()
        for address in listeners:
            key = abi.LISTENER_KEY.pack(mapped(address.ip), address.port, 0)
            identity, sockets, state = abi.LISTENER.unpack(found[key])
            self._listeners[address] = _Listener(key, identity, sockets, state == is_open)
        self.look(sock for sockets in listeners.values() for sock in sockets)

    def look(self, ours: Iterable[socket.socket]) -> None:
        """See anew which slots hold which of our sockets: another process has had its hands on them."""
        by_cookie = {sock_diag.cookie_of(sock).to_bytes(8, sys.byteorder): sock for sock in ours if sock.fileno() >= 0}
        self._steered.clear()
        for listener in self._listeners.values():
            for index in range(listener.sockets):
                slot = self._slot(listener, index)
                try:
                    held = bpf.map_lookup(self._maps["sockets"], slot, 8)
                except OSError:
                    continue  # its socket was closed
                if held is not None and held in by_cookie:
                    self._steered[slot] = by_cookie[held]

    def release(self) -> None:
        """Forget all entries, and leave them in the kernel: they are another process's."""
        self._listeners.clear()
        self._steered.clear()

    def close(self, address: SocketAddress) -> None:
        """Let no SYN to ``address`` in from now on, whatever the policy says: silence. A new address gets an entry, and
        its SYNs are answered with RST until :meth:`steer` names sockets. Raises ValueError for too many listeners."""
        listener = self._listeners.get(address)
        if listener is None:
            most = abi.constants()["MAX_LISTENERS"]
            used = {listener.id for listener in self._listeners.values()}
            free = next((i for i in range(most) if i not in used), None)
            if free is None:
                raise ValueError(f"a gate has at most {most} listeners")
            key = abi.LISTENER_KEY.pack(mapped(address.ip), address.port, 0)
            listener = self._listeners[address] = _Listener(key, free, 0)
        self._put(address, replace(listener, is_open=False))

    def steer(self, address: SocketAddress, sockets: Sequence[socket.socket]) -> None:
        """Steer the connections of a listener to these listening sockets of its address, and to no others any more;
        without any they are answered with RST. Raises ValueError for too many sockets, KeyError for an address that
        has no entry."""
        listener, most = self._listeners[address], abi.constants()["SOCKETS_PER_LISTENER"]
        if len(sockets) > most:
            raise ValueError(f"{len(sockets)} sockets: a listener has at most {most}")
        for index, sock in enumerate(sockets):
            self.steer_slot(address, index, sock)
        self._put(address, replace(listener, sockets=len(sockets)))
        for index in range(len(sockets), listener.sockets):
            self._clear_slot(listener, index)

    def steer_slot(self, address: SocketAddress, index: int, sock: socket.socket) -> None:
        """Steer one share of a listener's connections, by its index in :meth:`steer`, to another socket. Raises
        OSError if that does not listen."""
        slot = self._slot(self._listeners[address], index)
        # Not again to the same: the kernel would take the old link of the slot for the new one, and remove both.
        if self._steered.get(slot) is not sock:
            bpf.map_update(self._maps["sockets"], slot, sock.fileno().to_bytes(8, sys.byteorder))
            self._steered[slot] = sock

    def open(self, address: SocketAddress) -> None:
        """Let in to a listener whom the policy lets in. Raises KeyError for an address that has no entry."""
        self._put(address, replace(self._listeners[address], is_open=True))

    def remove(self, address: SocketAddress) -> None:
        """Take a listener from under the gate: all its sockets must be closed, or they serve whoever comes. Raises
        KeyError if it is not under it."""
        listener = self._listeners.pop(address)
        bpf.map_delete(self._maps["listeners"], listener.key)
        for index in range(listener.sockets):
            self._clear_slot(listener, index)

    def _put(self, address: SocketAddress, listener: _Listener) -> None:
        bpf.map_update(self._maps["listeners"], listener.key, _entry(listener))
        self._listeners[address] = listener

    @staticmethod
    def _slot(listener: _Listener, index: int) -> bytes:
        return (listener.id * abi.constants()["SOCKETS_PER_LISTENER"] + index).to_bytes(4, sys.byteorder)

    def _clear_slot(self, listener: _Listener, index: int) -> None:
        self._steered.pop(self._slot(listener, index), None)
        # A socket that was closed has left the map by itself; SOCKMAP answers EINVAL then.
        with contextlib.suppress(OSError):
            bpf.map_delete(self._maps["sockets"], self._slot(listener, index))

    def is_open(self, address: SocketAddress) -> bool:
        """Whether the policy decides who gets in at an address that has an entry. Raises KeyError."""
        return self._listeners[address].is_open

    def __contains__(self, address: object) -> bool:
        """Whether an address has an entry."""
        return address in self._listeners

    def id_of(self, address: SocketAddress) -> int:
        """Return the index of a listener in the per-listener maps. Raises KeyError."""
        return self._listeners[address].id

    def accept_slot(self, address: SocketAddress) -> int:
        """Return the index, in the map ``accepted``, of worker 0 on a listener; the other workers' follow."""
        return self.id_of(address) * abi.constants()["SOCKETS_PER_LISTENER"]

    def mend(self) -> list[SocketAddress]:
        """Put the entries of listeners, and what they are steered to, as they were meant; return which were not so."""
        wrong, keys = [], {listener.key for listener in self._listeners.values()}
        for key, _ in bpf.map_lookup_batch(self._maps["listeners"], abi.LISTENER_KEY.size, abi.LISTENER.size):
            if key not in keys:  # somebody else's work: its port would be shut, whosever it is
                bpf.map_delete(self._maps["listeners"], key)
        for address, listener in list(self._listeners.items()):
            found = bpf.map_lookup(self._maps["listeners"], listener.key, abi.LISTENER.size)
            wrong_here = found != _entry(listener)
            for index in range(listener.sockets):
                slot = self._slot(listener, index)
                sock = self._steered.get(slot)
                if sock is None or sock.fileno() < 0:
                    continue
                held = bpf.map_lookup(self._maps["sockets"], slot, 8)
                if held != sock_diag.cookie_of(sock).to_bytes(8, sys.byteorder):
                    with contextlib.suppress(OSError):  # it does not listen: said by cover
                        bpf.map_update(self._maps["sockets"], slot, sock.fileno().to_bytes(8, sys.byteorder))
                        wrong_here = True
            if wrong_here:
                self._put(address, listener)
                wrong.append(address)
        return wrong

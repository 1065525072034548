"""The listeners of a gate: which addresses it guards, whether they are open, and the sockets that their connections go
to.

Each has an entry in the map ``listeners`` and slots in ``sockets``, a SOCKMAP: bpf/sockets.h says which slot a
connection belongs to. One that serves sets of addresses and ports has sockets that are bound to none of them, but at an
address of their own, its *home*, where nobody gets in; its entry is in the map ``bound``, to which :mod:`.bindings`
lead.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.address import SocketAddress, mapped
from ..core.binding import Binding
from . import abi, bpf, sock_diag
from .bindings import Bindings
from .gate_maps import GateMaps

__all__ = ["Steering"]


@dataclass(frozen=True, slots=True)
class _Listener:
    key: bytes
    id: int
    sockets: int
    is_open: bool = False
    is_home: bool = False

    @property
    def entry(self) -> bytes:
        """What the programs are to find, under its address or in ``bound``."""
        state = abi.constants()["LISTENER_OPEN" if self.is_open else "LISTENER_CLOSED"]
        return abi.LISTENER.pack(self.id, self.sockets, state)

    @property
    def at_home(self) -> bytes:
        """What they are to find under its address."""
        return abi.LISTENER.pack(self.id, 0, abi.constants()["LISTENER_HOME"]) if self.is_home else self.entry


class Steering:
    """What the programs are told of listeners. One thread at a time changes it."""

    def __init__(self, maps: GateMaps) -> None:
        self._maps = maps
        self._listeners: dict[SocketAddress, _Listener] = {}
        self._steered: dict[bytes, socket.socket] = {}
        self._bindings = Bindings(maps)
        self._bound_to: dict[SocketAddress, tuple[Binding, ...]] = {}

    def __iter__(self) -> Iterator[SocketAddress]:
        """The addresses that have an entry."""
        return iter(list(self._listeners))

    def adopt(
        self,
        listeners: Mapping[SocketAddress, Sequence[socket.socket]],
        bound: Mapping[SocketAddress, Sequence[Binding]] | None = None,
    ) -> None:
        """Go on with the entries that another process has made for these addresses, with what they are steered to, and
        with what they are ``bound`` to. Raises KeyError for an address that has none."""
        found = dict(bpf.map_lookup_batch(self._maps["listeners"], abi.LISTENER_KEY.size, abi.LISTENER.size))
        is_open, home = abi.constants()["LISTENER_OPEN"], abi.constants()["LISTENER_HOME"]
        self._listeners.clear()
        for address in listeners:
            key = abi.LISTENER_KEY.pack(mapped(address.ip), address.port, 0)
            identity, sockets, state = abi.LISTENER.unpack(found[key])
            is_home = state == home
            if is_home:
                _, sockets, state = abi.LISTENER.unpack(self._bound(identity))
            self._listeners[address] = _Listener(key, identity, sockets, state == is_open, is_home)
        self._bindings.adopt()
        self._bound_to = {home: tuple(bindings) for home, bindings in (bound or {}).items()}
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
        self._bound_to.clear()

    def bind(self, bound: Mapping[SocketAddress, Sequence[Binding]]) -> None:
        """Have the listeners at these homes, and no others, serve what they are bound to. Raises KeyError for a home
        that has no entry, ValueError for too many bindings, or OSError; then it is to be said again."""
        pairs = [(one, self._listeners[home].id) for home, bindings in bound.items() for one in bindings]
        self._bindings.put(pairs, [at for at, listener in self._listeners.items() if not listener.is_home])
        self._bound_to = {home: tuple(bindings) for home, bindings in bound.items()}

    def close(self, address: SocketAddress, *, home: bool = False, meanwhile: Sequence[socket.socket] = ()) -> None:
        """Let no SYN to ``address`` in from now on, whatever the policy says: silence. A new address gets an entry, and
        its SYNs are answered with RST until :meth:`steer` names sockets, or by silence where there are some to steer to
        ``meanwhile``; as a ``home`` it is for sockets that serve what :meth:`bind` says. Raises ValueError for too many
        listeners."""
        listener = self._listeners.get(address)
        if listener is None:
            most = abi.constants()["MAX_LISTENERS"]
            used = {listener.id for listener in self._listeners.values()}
            free = next((i for i in range(most) if i not in used), None)
            if free is None:
                raise ValueError(f"a gate has at most {most} listeners")
            key = abi.LISTENER_KEY.pack(mapped(address.ip), address.port, 0)
            listener = self._listeners[address] = _Listener(key, free, len(meanwhile), is_home=home)
            for index, sock in enumerate(meanwhile):
                self.steer_slot(address, index, sock)
            if home:  # before the sockets listen: by this address nobody gets in
                bpf.map_update(self._maps["listeners"], key, listener.at_home)
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
        if address in self._bound_to:
            self.bind({home: bindings for home, bindings in self._bound_to.items() if home != address})
        bpf.map_delete(self._maps["listeners"], listener.key)
        for index in range(listener.sockets):
            self._clear_slot(listener, index)

    def _put(self, address: SocketAddress, listener: _Listener) -> None:
        if listener.is_home:
            bpf.map_update(self._maps["bound"], listener.id.to_bytes(4, sys.byteorder), listener.entry)
        else:
            bpf.map_update(self._maps["listeners"], listener.key, listener.entry)
        self._listeners[address] = listener

    def _bound(self, identity: int) -> bytes:
        entry = bpf.map_lookup(self._maps["bound"], identity.to_bytes(4, sys.byteorder), abi.LISTENER.size)
        assert entry is not None  # an array has all its elements
        return entry

    @staticmethod
    def _slot(listener: _Listener, index: int) -> bytes:
        return (listener.id * abi.constants()["SOCKETS_PER_LISTENER"] + index).to_bytes(4, sys.byteorder)

    def _clear_slot(self, listener: _Listener, index: int) -> None:
        self._steered.pop(self._slot(listener, index), None)
        # A socket that was closed has left the map by itself; SOCKMAP answers EINVAL then.
        with contextlib.suppress(OSError):
            bpf.map_delete(self._maps["sockets"], self._slot(listener, index))

    def is_home(self, address: SocketAddress) -> bool:
        """Whether an address that has an entry is that of sockets which serve bindings. Raises KeyError."""
        return self._listeners[address].is_home

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
            wrong_here = found != listener.at_home
            if listener.is_home:
                if wrong_here:
                    bpf.map_update(self._maps["listeners"], listener.key, listener.at_home)
                wrong_here |= self._bound(listener.id) != listener.entry
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
        if self._bindings.mend():
            wrong += [
                address for address, listener in self._listeners.items() if listener.is_home and address not in wrong
            ]
        return wrong

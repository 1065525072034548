"""The listening sockets of a server, and the gate in front of them: first closed, last open.

An address has an entry in the gate from before its first socket listens until after its last one is closed. Each
revision of the configuration has sockets of its own for it (SO_REUSEPORT); the gate steers to those of the revision in
force and to no others, so a connection is served by the services that go with the policy that let it in. Where no gate
steers, and on Unix sockets, the sockets stay and later revisions go on with them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..core.address import Endpoint, SocketAddress
from ..loader import Gate
from ..process import Listener, WorkerObserver, WorkerProcess
from ..services.tcp import BACKLOG, bind_tcp
from ..services.unix import bind_unix

__all__ = ["ListenAt", "Listeners", "SocketSet"]


@dataclass(frozen=True, slots=True)
class ListenAt:
    """Where to listen, under a name. ``mode`` is that of a Unix socket's file."""

    name: str
    endpoint: Endpoint
    mode: int = 0o660


@dataclass(frozen=True, slots=True)
class _Open:
    sockets: tuple[socket.socket, ...]
    address: SocketAddress | None


_Key = tuple[Endpoint, str]


def _key(at: ListenAt) -> _Key:
    # A reload may give an address another name. Only where the kernel picks the port is the name what tells two
    # listeners apart.
    picked = at.endpoint.address is not None and at.endpoint.address.port == 0
    return at.endpoint, at.name if picked else ""


@dataclass(frozen=True, slots=True, eq=False)
class SocketSet:
    """The sockets of one revision, by what they listen at."""

    wanted: tuple[ListenAt, ...]
    opened: Mapping[_Key, _Open]

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """As a plan has them."""
        return tuple(Listener(at.name, self.opened[_key(at)].sockets) for at in self.wanted)

    def address(self, at: ListenAt) -> SocketAddress | None:
        """Where it listens; None for a Unix socket."""
        return self.opened[_key(at)].address

    @property
    def addresses(self) -> dict[SocketAddress, tuple[socket.socket, ...]]:
        """The TCP addresses with their sockets."""
        return {entry.address: entry.sockets for entry in self.opened.values() if entry.address is not None}


class Listeners(WorkerObserver):
    """What is open now. With a ``gate`` every TCP listener is under it."""

    def __init__(self, gate: Gate | None) -> None:
        self._gate = gate
        self._in_force = SocketSet((), {})
        self._sets: list[SocketSet] = []
        self._away: dict[tuple[str, int], int] = {}

    def prepare(self, wanted: Iterable[ListenAt], sockets: int) -> SocketSet:
        """Open sockets for all of ``wanted``, ``sockets`` for each TCP address: one a worker, so that each has an
        accept queue that outlives it. Nobody gets in on them: a new address is closed in the gate, and with an old
        one the gate steers as before.

        Raises OSError naming the address, also if another process listens there, or ValueError if the gate is full;
        then nothing of it stays open.
        """
        wanted = tuple(wanted)
        opened: dict[_Key, _Open] = {}
        new = SocketSet(wanted, opened)
        self._sets.append(new)
        try:
            for at in wanted:
                if _key(at) not in opened:
                    opened[_key(at)] = self._opened(at, sockets)
        except BaseException:
            self.give_up(new)
            raise
        return new

    def _opened(self, at: ListenAt, count: int) -> _Open:
        before = self._in_force.opened.get(_key(at))
        if at.endpoint.address is None:
            return before or _Open((bind_unix(at.endpoint.path, mode=at.mode),), None)
        if before is not None and self._gate is None:
            return before
        wanted = at.endpoint.address if before is None or before.address is None else before.address
        held = any(_overlap(wanted, address) for one in self._sets for address in one.addresses)
        sockets = _bind(wanted, count, shared=held)
        address = SocketAddress.from_sockaddr(sockets[0].getsockname())
        try:
            if self._gate is not None and not self._gate.guards(address):
                self._gate.close_listener(address)
            for sock in sockets:
                _listen(sock, address)
        except BaseException:
            _close(sockets)
            self._drop_entry(address)
            raise
        return _Open(sockets, address)

    # -- from one revision to the next ---------------------------------------------------------------------------

    def close_gate(self) -> None:
        """Let no SYN in on any address of the revision in force: silence, so that clients try again."""
        self._each_in_force(Gate.close_listener)

    def reopen_gate(self) -> None:
        """Let in again to the revision in force, after :meth:`close_gate`."""
        self._each_in_force(Gate.open_listener)

    def _each_in_force(self, what: object) -> None:
        if self._gate is not None:
            for address in self._in_force.addresses:
                what(self._gate, address)  # type: ignore[operator]

    def switch(self, new: SocketSet) -> None:
        """After :meth:`close_gate`: steer to the sockets of ``new``, and to no others; :meth:`reopen_gate` is what
        opens them. Addresses that only others have answer RST from now on. Raises OSError; then the gate steers as
        before."""
        old, self._in_force = self._in_force, new
        if self._gate is None:
            return
        try:
            for address, sockets in new.addresses.items():
                self._gate.steer(address, sockets)
        except BaseException:
            self._in_force = old
            for address, sockets in old.addresses.items():
                self._gate.steer(address, sockets)
            raise
        self._away.clear()
        for address in old.addresses.keys() - new.addresses.keys():
            self._gate.close_listener(address)
            self._gate.steer(address, ())

    def give_up(self, unwanted: SocketSet) -> None:
        """Close what only this set has. Of a set that was in force, no worker may listen any more; of one that was not,
        all workers have ended."""
        self._sets.remove(unwanted)
        kept = {sock for one in self._sets for entry in one.opened.values() for sock in entry.sockets}
        for key, entry in unwanted.opened.items():
            if kept.issuperset(entry.sockets):
                continue
            _close(entry.sockets)
            if entry.address is not None:
                self._drop_entry(entry.address)
            elif key[0].path and not key[0].path.startswith("@"):
                with contextlib.suppress(FileNotFoundError):  # somebody has tidied up before us
                    os.unlink(key[0].path)

    def _drop_entry(self, address: SocketAddress) -> None:
        """Take an address from under the gate that no set has any more."""
        wanted = any(address in one.addresses for one in self._sets)
        if self._gate is not None and self._gate.guards(address) and not wanted:
            self._gate.remove_listener(address)

    def stop(self) -> None:
        """Close our own sockets; those that workers have are judged on."""
        for one in self._sets:
            for entry in one.opened.values():
                _close(entry.sockets)

    def close(self) -> None:
        """Close all, when no worker listens any more."""
        self._in_force = SocketSet((), {})
        for one in list(self._sets):
            self.give_up(one)

    # -- steering around workers ---------------------------------------------------------------------------------

    def serving(self, worker: WorkerProcess) -> None:
        if worker.superseded:
            return
        for index in self._indexes(worker):
            self._away.pop(index, None)
        self._steer_shares()

    def silent(self, worker: WorkerProcess) -> None:
        for index in self._indexes(worker):
            self._away[index] = worker.pid
        self._steer_shares()

    def ended(self, worker: WorkerProcess) -> None:
        if not worker.superseded:
            self.silent(worker)

    def _indexes(self, worker: WorkerProcess) -> list[tuple[str, int]]:
        in_force = {listener.name: listener.sockets for listener in self._in_force.listeners}
        return [
            (listener.name, index)
            for listener in worker.plan.listeners
            if in_force.get(listener.name) == listener.sockets
            for index, _ in listener.for_worker(worker.number, worker.plan.workers)
        ]

    def _steer_shares(self) -> None:
        """Steer each share of the connections to its own socket, or to another's while its worker does not serve."""
        if self._gate is None:
            return
        for at in self._in_force.wanted:
            entry = self._in_force.opened[_key(at)]
            if entry.address is None:
                continue
            serving = [index for index in range(len(entry.sockets)) if (at.name, index) not in self._away]
            for index in range(len(entry.sockets)):
                takes = index if index in serving or not serving else serving[index % len(serving)]
                if entry.sockets[takes].fileno() >= 0:
                    self._gate.steer_slot(entry.address, index, entry.sockets[takes])

    # -- what is seen --------------------------------------------------------------------------------------------

    def addresses(self) -> list[SocketAddress]:
        """The TCP addresses that are open now."""
        return list(self._in_force.addresses)

    def described(self) -> list[dict[str, object]]:
        """What ``status`` needs to know: name, address, and the index in the gate's maps of those under it."""
        rows: list[dict[str, object]] = []
        for at in self._in_force.wanted:
            address = self._in_force.address(at)
            row: dict[str, object] = {"name": at.name, "address": str(at.endpoint if address is None else address)}
            if self._gate is not None and address is not None and self._gate.guards(address):
                row["id"] = self._gate.listener_id(address)
            rows.append(row)
        return rows

    def accept_slots(self, sockets: SocketSet) -> dict[str, int]:
        """The first index in the map ``accepted`` of each listener under the gate, by name."""
        if self._gate is None:
            return {}
        found = {at.name: sockets.address(at) for at in sockets.wanted}
        return {name: self._gate.accept_slot(address) for name, address in found.items() if address is not None}


def _bind(address: SocketAddress, count: int, *, shared: bool) -> tuple[socket.socket, ...]:
    """Bind sockets to one address. If it is not ``shared`` with others of ours, nobody else may listen there: then
    SO_REUSEPORT, which would let two servers share it unseen, is set after that is known."""
    host = str(address.ip)
    sockets = [bind_tcp(host, address.port, reuse_port=shared, backlog=None)]
    try:
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        while len(sockets) < count:
            sockets.append(bind_tcp(host, sockets[0].getsockname()[1], reuse_port=True, backlog=None))
    except BaseException:
        _close(sockets)
        raise
    return tuple(sockets)


def _listen(sock: socket.socket, address: SocketAddress) -> None:
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        text = f"cannot listen on {address.ip} port {address.port}: {error.strerror}"
        raise OSError(error.errno or errno.EIO, text) from error


def _overlap(one: SocketAddress, other: SocketAddress) -> bool:
    """Whether two addresses have connections in common: equal, or one of them a wildcard."""
    if one.port != other.port or one.ip.version != other.ip.version:
        return False
    return one.ip == other.ip or one.ip.is_unspecified or other.ip.is_unspecified


def _close(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()

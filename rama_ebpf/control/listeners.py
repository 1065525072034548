"""The listening sockets of a server, and the gate in front of them: first closed, last open.

An address has an entry in the gate from before its first socket listens until after its last one is closed. Each
revision of the configuration has sockets of its own for it (SO_REUSEPORT); the gate steers to those of the revision in
force and to no others, so a connection is served by the services that go with the policy that let it in. Where no gate
steers, and on Unix sockets, the sockets stay and later revisions go on with them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ..core.address import SocketAddress
from ..core.binding import Binding
from ..kernel import sock_diag
from ..kernel.own_addresses import own_addresses
from ..kernel.seal import seal, unseal
from ..loader import Cover, Gate
from ..process import WorkerObserver, WorkerProcess
from ..services.unix import bind_unix
from .held import HeldAddresses, hold
from .sockets import (
    Key,
    ListenAt,
    OpenListener,
    SocketSet,
    answer_from_anywhere,
    bind,
    close_all,
    key_of,
    listen,
    other_owner,
    overlap,
    stolen_from,
)

__all__ = ["Listeners", "Watched"]

log = logging.getLogger("rama_ebpf")


@dataclass(frozen=True, slots=True)
class Watched:
    """A TCP listener as a probe sees it: by its address, the cookies of its sockets, and what these are bound to."""

    listener: OpenListener
    address: SocketAddress
    cookies: tuple[int, ...]
    bindings: tuple[Binding, ...] = ()


_NOT_PROBED: Final = Cover(why="it has not been probed")


class Listeners(WorkerObserver):
    """What is open now. With a ``gate`` every TCP listener is under it; ``why_none`` says why there is none."""

    def __init__(self, gate: Gate | None, why_none: str = "", held: HeldAddresses | None = None) -> None:
        self._gate = gate
        self.held = HeldAddresses() if held is None else held
        """Addresses that were kept for us while no server ran."""
        self._no_gate = Cover(why=f"there is no gate in the kernel: {why_none}")
        self._covers: dict[OpenListener, Cover] = {}
        self._changing = False
        self._in_force = SocketSet((), {})
        self._sets: list[SocketSet] = []
        self._away: dict[tuple[str, int], int] = {}
        self.is_ours = True
        """Whether we say who is let in and steered where: not while, or after, another server does."""
        self.owns = True
        """Whether what nobody needs any more is ours to take away: not while another server may go on with it."""
        self._adopted: SocketSet | None = None

    # -- from one server to the next -----------------------------------------------------------------------------

    def handed(self) -> tuple[tuple[ListenAt, tuple[socket.socket, ...]], ...]:
        """The listeners of the revision in force, with their sockets, for another server."""
        found = {key_of(at): (at, self._in_force.opened[key_of(at)].sockets) for at in self._in_force.wanted}
        return tuple(found.values())

    @property
    def settled(self) -> bool:
        """Whether only the revision in force has listening sockets."""
        return self._sets == [self._in_force]

    def adopt(self, handed: Iterable[tuple[ListenAt, tuple[socket.socket, ...]]]) -> None:
        """Go on with what another server has opened. It is in force, and not ours, until :meth:`switch`. Raises
        KeyError if the gate has no entry for it."""
        opened = {}
        for at, sockets in handed:
            address = None if at.endpoint.address is None else SocketAddress.from_sockaddr(sockets[0].getsockname())
            opened[key_of(at)] = OpenListener(sockets, address, is_home=bool(at.bindings))
        self._adopted = self._in_force = SocketSet(tuple(at for at, _ in handed), opened)
        self._sets.append(self._in_force)
        self.is_ours = self.owns = False
        if self._gate is not None:
            self._gate.listeners.adopt(self._in_force.addresses, self._in_force.bindings)

    def forget_adopted(self) -> None:
        """The server before does not listen any more: close what only it has needed."""
        if self._adopted is not None and self._adopted in self._sets:
            self.give_up(self._adopted)
        self._adopted = None

    def take_back(self) -> None:
        """Say again who is let in and steered where, after another server did: as if it had never been. All stay
        closed until :meth:`reopen_gate`."""
        self.is_ours = True
        self._changing = True
        if self._gate is not None:
            self._look()
            self._gate.listeners.mend()
            self.close_gate()

    def _look(self) -> None:
        if self._gate is not None:
            entries = (entry for one in self._sets for entry in one.opened.values())
            self._gate.listeners.look(sock for entry in entries for sock in entry.sockets)

    # -- what is open --------------------------------------------------------------------------------------------

    def prepare(self, wanted: Iterable[ListenAt], sockets: int) -> SocketSet:
        """Open sockets for all of ``wanted``, ``sockets`` for each TCP address: one a worker, so that each has an
        accept queue that outlives it. Nobody gets in on them: a new address is closed in the gate, and with an old
        one the gate steers as before.

        Raises OSError naming the address, also if another process listens there, or ValueError if the gate is full;
        then nothing of it stays open.
        """
        wanted = tuple(wanted)
        opened: dict[Key, OpenListener] = {}
        new = SocketSet(wanted, opened)
        self._sets.append(new)
        try:
            for at in wanted:
                if key_of(at) not in opened:
                    opened[key_of(at)] = self._opened(at, sockets)
                if at.transparent:
                    for sock in opened[key_of(at)].sockets:
                        answer_from_anywhere(sock)
            self._refuse_stolen(wanted)
        except BaseException:
            self.give_up(new)
            raise
        return new

    def _opened(self, at: ListenAt, count: int) -> OpenListener:
        before = self._in_force.opened.get(key_of(at))
        if at.endpoint.address is None:
            return before or OpenListener((bind_unix(at.endpoint.path, mode=at.mode),), None)
        if before is not None and (self._gate is None or not self.is_ours):
            return before  # handshakes that have begun on a socket end on it
        wanted = at.endpoint.address if before is None or before.address is None else before.address
        held = any(overlap(wanted, address) for one in self._sets for address in one.addresses)
        held |= wanted in self.held
        if at.bindings and self._gate is None:
            raise ValueError(f"listener {at.name}: only the gate in the kernel serves {at}: {self._no_gate.why}")
        sockets = bind(wanted, count, shared=held)
        address = SocketAddress.from_sockaddr(sockets[0].getsockname())
        try:
            if self._gate is not None and address not in self._gate.listeners:
                self._gate.listeners.close(address, home=bool(at.bindings), meanwhile=self.held.at(address))
            for sock in sockets:
                if self._gate is not None:
                    seal(sock)
                listen(sock, address)
            self._refuse_shared(address, sockets)
        except BaseException:
            close_all(sockets)
            self._drop_entry(address)
            raise
        return OpenListener(sockets, address, is_home=bool(at.bindings))

    def _refuse_stolen(self, wanted: Iterable[ListenAt]) -> None:
        """Raise OSError if somebody else would lose connections to a binding."""
        bindings = [binding for at in wanted for binding in at.bindings]
        if bindings:
            try:
                taken = stolen_from(bindings, self._foreign(sock_diag.listening()), own_addresses())
            except OSError as error:
                raise OSError(error.errno, f"cannot tell whose connections bindings would take: {error}") from error
            if taken:
                raise OSError(errno.EADDRINUSE, taken)

    def _foreign(self, listening: Iterable[sock_diag.ListeningSocket]) -> list[sock_diag.ListeningSocket]:
        ours = {
            cookie for one in self._sets for watched in _watched(one) for cookie in watched.cookies
        } | self.held.cookies
        return [other for other in listening if other.cookie not in ours]

    def _refuse_shared(self, address: SocketAddress, sockets: Iterable[socket.socket]) -> None:
        """Raise OSError if somebody else listens on connections of ours: two that began at the same moment, or one that
        shares its port with all of its user (SO_REUSEPORT)."""
        ours = {sock_diag.cookie_of(sock) for sock in sockets} | self.held.cookies
        for one in self._sets:
            ours.update(cookie for watched in _watched(one) for cookie in watched.cookies)
        owner = other_owner(address, ours)
        if owner:
            raise OSError(errno.EADDRINUSE, f"cannot listen on {address.ip} port {address.port}: {owner}")

    # -- from one revision to the next ---------------------------------------------------------------------------

    def close_gate(self) -> None:
        """Let no SYN in on any address of the revision in force: silence, so that clients try again."""
        self._changing = True
        if self._gate is not None:
            for address, sockets in self._in_force.addresses.items():
                self._gate.listeners.close(address)
                if self._in_force is self._adopted:  # the same sockets will serve: no handshake ends meanwhile either
                    for sock in sockets:
                        seal(sock)

    def reopen_gate(self) -> None:
        """Let in again to the revision in force, after :meth:`close_gate`, on what is guarded."""
        self._changing = False
        self._open_guarded()

    def _open_guarded(self) -> None:
        if self._gate is None or not self.is_ours:
            return
        for at in self._in_force.wanted:
            listener = self._in_force.opened[key_of(at)]
            if listener.address is None:
                continue
            cover = self._covers.get(listener, _NOT_PROBED)
            sockets = [sock for sock in listener.sockets if sock.fileno() >= 0]
            if _may_open(at, cover):
                for sock in sockets:
                    unseal(sock)
                if not self._gate.listeners.is_open(listener.address):
                    self._gate.listeners.open(listener.address)
            else:
                self._gate.listeners.close(listener.address)
                for sock in sockets:
                    seal(sock)

    # -- what guards them ----------------------------------------------------------------------------------------

    def watched(self) -> list[Watched]:
        """What a probe is to look at: the TCP listeners of all revisions whose sockets are ours still."""
        return [watched for one in self._sets for watched in _watched(one)]

    def judge(self, covers: Mapping[OpenListener, Cover]) -> int:
        """Take what a probe found: open what is guarded, close what is not. Return how many entries of the gate others
        had written, which are put back."""
        wrong: list[SocketAddress] = []
        self._covers.update(covers)
        if self._gate is not None and self.is_ours and not self._changing:
            wrong = self._gate.listeners.mend()
            for address in wrong:
                log.warning("the gate's entry of %s was not as it was meant: put back", address)
            self._open_guarded()
        return len(wrong)

    def cover(self, at: ListenAt) -> Cover | None:
        """How a listener of the revision in force is guarded; None for a Unix socket."""
        listener = self._in_force.opened[key_of(at)]
        if listener.address is None:
            return None
        return self._no_gate if self._gate is None else self._covers.get(listener, _NOT_PROBED)

    def shut(self) -> dict[str, str]:
        """The listeners of the revision in force, by address, that are closed because they are not guarded, and why."""
        found = {}
        for at in self._in_force.wanted:
            cover = self.cover(at)
            if cover is not None and not _may_open(at, cover):
                found[str(at if at.bindings else self._in_force.address(at))] = cover.why
        return found

    def switch(self, new: SocketSet) -> None:
        """After :meth:`close_gate`: steer to the sockets of ``new``, and to no others; :meth:`reopen_gate` is what
        opens them. Addresses that only others have answer RST from now on. Raises OSError; then the gate steers as
        before."""
        old, self._in_force = self._in_force, new
        if self._gate is None:
            return
        if old is self._adopted:
            self._look()
        try:
            self._steer(new)
        except BaseException:
            self._in_force = old
            self._steer(old)
            raise
        self._away.clear()
        self.is_ours = True
        for address in old.addresses.keys() - new.addresses.keys():
            self._gate.listeners.close(address)
            self._gate.listeners.steer(address, ())

    def _steer(self, to: SocketSet) -> None:
        assert self._gate is not None
        for address, sockets in to.addresses.items():
            self._gate.listeners.steer(address, sockets)
        self._gate.listeners.bind(to.bindings)

    def give_up(self, unwanted: SocketSet) -> None:
        """Close what only this set has. Of a set that was in force, no worker may listen any more; of one that was not,
        all workers have ended."""
        self._sets.remove(unwanted)
        kept = {sock for one in self._sets for entry in one.opened.values() for sock in entry.sockets}
        for key, entry in unwanted.opened.items():
            if kept.issuperset(entry.sockets):
                continue
            close_all(entry.sockets)
            self._covers.pop(entry, None)
            if entry.address is not None:
                self._drop_entry(entry.address)
            elif key[0].path and not key[0].path.startswith("@") and (self.owns or key not in self._others):
                with contextlib.suppress(FileNotFoundError):  # somebody has tidied up before us
                    os.unlink(key[0].path)

    def _drop_entry(self, address: SocketAddress) -> None:
        """Take an address from under the gate that no set has any more."""
        wanted = any(address in one.addresses for one in self._sets)
        if self._gate is not None and self.owns and address in self._gate.listeners and not wanted:
            self._gate.listeners.remove(address)

    @property
    def _others(self) -> frozenset[Key]:
        """What another server may go on with."""
        return frozenset((self._adopted or self._in_force).opened)

    def leave_to_manager(self) -> bool:
        """Have the service manager hold our addresses, and let no new connection in any more: it gets no answer for as
        long as the manager holds them, and RST if it does not. Return whether any was left to it."""
        if self._gate is None or not self.is_ours:
            return False
        left = False
        for at in self._in_force.wanted:
            address = self._in_force.address(at)
            if address is None or at.bindings or at.endpoint.address is None or not at.endpoint.address.port:
                continue
            try:
                with contextlib.closing(bind(address, 1, shared=True)[0]) as sock:
                    seal(sock)
                    listen(sock, address)
                    if not hold(sock):
                        return left
                    self._changing = left = True
                    self._gate.listeners.close(address)
                    self._gate.listeners.steer(address, (sock,))
            except OSError as error:
                log.warning("%s is not held while no server runs: %s", address, error)
        return left

    def stop(self) -> None:
        """Close our own sockets; those that workers have are judged on."""
        for one in self._sets:
            for entry in one.opened.values():
                close_all(entry.sockets)

    def close(self) -> None:
        """Close all, when no worker listens any more."""
        for one in list(self._sets):
            self.give_up(one)
        self._in_force = SocketSet((), {})

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
        if self._gate is None or not self.is_ours:
            return
        for at in self._in_force.wanted:
            entry = self._in_force.opened[key_of(at)]
            if entry.address is None:
                continue
            first = self._in_force.first_index(at)
            serving = [index for index in range(len(entry.sockets)) if (at.name, first + index) not in self._away]
            for index in range(len(entry.sockets)):
                takes = index if index in serving or not serving else serving[index % len(serving)]
                if entry.sockets[takes].fileno() >= 0:
                    self._gate.listeners.steer_slot(entry.address, index, entry.sockets[takes])

    # -- what is seen --------------------------------------------------------------------------------------------

    def addresses(self) -> list[SocketAddress]:
        """The TCP addresses that are open now; of bindings an example each."""
        homes = self._in_force.bindings
        bound = [binding.example for bindings in homes.values() for binding in bindings]
        return [*(address for address in self._in_force.addresses if address not in homes), *bound]

    def served(self) -> list[Binding]:
        """What clients can connect to."""
        homes = self._in_force.bindings
        return [
            *(Binding.at(address) for address in self._in_force.addresses if address not in homes),
            *(binding for bindings in homes.values() for binding in bindings),
        ]

    def described(self) -> list[dict[str, object]]:
        """What ``status`` needs to know: name, address, and the index in the gate's maps of those under it."""
        rows: list[dict[str, object]] = []
        for at in self._in_force.wanted:
            address = self._in_force.address(at)
            row: dict[str, object] = {
                "name": at.name,
                "address": str(at if address is None or at.bindings else address),
            }
            if at.bindings:
                row["bindings"] = [[str(one.network), one.first, one.last, one.implied] for one in at.bindings]
            if self._gate is not None and address is not None and address in self._gate.listeners:
                row["id"] = self._gate.listeners.id_of(address)
            if (cover := self.cover(at)) is not None:
                optional = "" if at.needs_gate or cover.guarded else " (gate is optional)"
                row |= {
                    "guarded": cover.guarded,
                    "guard": f"{cover}{optional}",
                    "open": _may_open(at, cover),
                }
            other = next((one for one in rows if at.bindings and one["name"] == at.name), None)
            if other is None:
                rows.append(row)
            else:
                other |= _joined(other, row)
        return rows

    def accept_slots(self, sockets: SocketSet) -> dict[str, int]:
        """The first index in the map ``accepted`` of each listener under the gate, by name."""
        if self._gate is None:
            return {}
        # Of one name the first: its slots are enough for the sockets of both families.
        found = {at.name: sockets.address(at) for at in reversed(sockets.wanted)}
        return {
            name: self._gate.listeners.accept_slot(address) for name, address in found.items() if address is not None
        }


def _joined(one: dict[str, object], other: dict[str, object]) -> dict[str, object]:
    """Of two rows, the families of one listener: both are well where both are."""
    worse = one if not one.get("guarded") else other
    bindings = [*_list(one["bindings"]), *_list(other["bindings"])]
    joined: dict[str, object] = {"address": f"{one['address']}, {other['address']}", "bindings": bindings}
    if "id" in one and "id" in other:
        joined["ids"] = [one["id"], other["id"]]
    return joined | {name: worse[name] for name in ("guarded", "guard", "open") if name in worse}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _may_open(at: ListenAt, cover: Cover) -> bool:
    """Whether clients may come to a listener that is covered like this."""
    return cover.guarded or not at.needs_gate


def _watched(sockets: SocketSet) -> list[Watched]:
    bindings = sockets.bindings
    return [
        Watched(
            listener,
            listener.address,
            tuple(map(sock_diag.cookie_of, listener.sockets)),
            bindings.get(listener.address, ()),
        )
        for listener in sockets.opened.values()
        if listener.address is not None and all(sock.fileno() >= 0 for sock in listener.sockets)
    ]

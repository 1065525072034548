"""The life of the kernel programs: load, pin, attach, unload.

What is where, and who outlives whom:

- **Maps** are pinned under ``/sys/fs/bpf/rama-ebpf/<instance>/layout-N``, so that commands in other processes change
  them and a crash loses no policy: the next start takes them over.
- **Programs** are attached with links, and the links are held by the server's descriptors alone. When the server ends,
  by whatever signal, the kernel detaches them; nothing of a dead server can filter, steer or leak.
- The **cgroup** of an instance is a child of the one the server was started in. It is empty after the server's end and
  is removed by a clean stop, the next start, or :func:`unload`.

Rejected: ``bpf_prog_attach`` (its attachments outlive a ``kill -9``), pinned links (likewise; they would guard
listeners that no longer exist), and TC or netfilter hooks (they see other services' traffic).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from .core.address import SocketAddress, mapped
from .kernel import abi, bpf, bpffs, cgroup, sock_diag
from .kernel.attachments import HOOKS, Attachments, Mending, Target
from .kernel.compile import Unit, amalgamate
from .kernel.gate_maps import USUAL_REJECTS, GateMaps, LayoutMismatch, MapSizes
from .kernel.instance import Instance, InstanceBusy, PolicyBusy
from .kernel.programs import code_cache, load_programs
from .kernel.sock_diag import ListeningSocket
from .kernel.witness import WITNESS_PROGRAM, Witness
from .kernel.xdp import XdpAttachment

__all__ = ["AcceptCounter", "Cover", "Gate", "PolicyKeeper", "forget_compiled", "load", "unload"]

log = logging.getLogger(__name__)

_LEAVE_SECONDS: Final = 2.0
"""How long the end of a gate waits for somebody who is changing its policy."""


class PolicyKeeper(Protocol):
    """Who knows what policy belongs into maps that are made anew. Called under the policy's lock."""

    def supersedes(self, pinned: GateMaps) -> bool:
        """Whether the policy in pinned maps is not to be taken over as it is: another one is younger."""

    def fill(self, new: GateMaps, pinned: GateMaps | None, why: str) -> None:
        """Put the policy into new maps. ``pinned`` are those that they replace, if they can be used; if not, ``why``
        says so, and is empty where there were none."""


@dataclass(frozen=True, slots=True)
class _Listener:
    key: bytes
    id: int
    sockets: int
    is_open: bool = False


def _entry(listener: _Listener) -> bytes:
    state = abi.constants()["LISTENER_OPEN" if listener.is_open else "LISTENER_CLOSED"]
    return abi.LISTENER.pack(listener.id, listener.sockets, state)


@dataclass(frozen=True, slots=True)
class Cover:
    """Whether a listener is guarded, and by which hooks; ``why`` says why it is not."""

    hooks: tuple[str, ...] = ()
    why: str = ""

    @property
    def guarded(self) -> bool:
        return not self.why

    def __str__(self) -> str:
        return f"guarded by {', '.join(self.hooks)}" if self.guarded else f"NOT GUARDED: {self.why}"


class Gate:
    """The loaded gate of one instance. Everything it attached is detached by :meth:`close`, or when the process ends.

    Sockets must be created after :meth:`attach`, because a socket belongs to the cgroup its creator was in.
    """

    def __init__(self, instance: Instance, maps: GateMaps, programs: dict[str, int], *, fresh: bool = True) -> None:
        self.instance = instance
        self.maps = maps
        self.fresh = fresh
        """Whether the maps were made for this gate: no policy was pinned before."""
        self.programs = programs
        self.attachments = Attachments(instance.cgroup_name, maps, programs)
        self._listeners: dict[SocketAddress, _Listener] = {}
        self._steered: dict[bytes, socket.socket] = {}

    # -- attach --------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Move this process into the instance's cgroup, if that may be, and attach all hooks but XDP.

        Raises OSError; then nothing stays attached.
        """
        self.attachments.attach()

    def attach_xdp(self, interface: str) -> XdpAttachment:
        """Attach the XDP program, which must have been loaded, to an interface. Raises
        :class:`~rama_ebpf.kernel.xdp.XdpError`; what was attached before stays."""
        return self.attachments.attach_xdp(interface)

    @property
    def guards_workers(self) -> bool:
        """Whether the kernel enforces the egress policy on workers: not where cgroups may not be changed."""
        return self.attachments.workers is not None

    def adopt_worker(self, pid: int) -> None:
        """Put a worker that has just been started under the egress policy, before it makes any socket."""
        workers = self.attachments.workers
        if workers is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended already; its end is seen elsewhere
                cgroup.move(pid, workers)

    @property
    def witness(self) -> Witness:
        """Who says what the programs would decide, as long as this gate is open."""
        return Witness(self.programs[WITNESS_PROGRAM.name])

    @property
    def xdp(self) -> tuple[XdpAttachment, ...]:
        """Where XDP is attached, or was last."""
        return self.attachments.xdp

    @property
    def cgroup(self) -> Path | None:
        """The instance's cgroup while attached."""
        return self.attachments.cgroup

    def limit_rejects(self, limit: tuple[int, int] | None) -> None:
        """Say how many RST answer ``reject``: a limit's emission and tolerance in nanoseconds, None for as many as is
        usual. Beyond it a ``reject`` is silent."""
        bpf.map_update(self.maps["reject_meter"], bytes(4), abi.REJECT_METER.pack(*(limit or USUAL_REJECTS), 0))

    # -- listeners -----------------------------------------------------------------------------------------------

    def add_listener(self, sockets: Sequence[socket.socket]) -> SocketAddress:
        """Put listening TCP sockets of one address under the gate, steer its connections to them, and open it.

        Returns the address. Raises ValueError for too many sockets or listeners, or sockets of several addresses.
        """
        addresses = {SocketAddress.from_sockaddr(sock.getsockname()) for sock in sockets}
        if len(addresses) != 1:
            raise ValueError(f"the sockets of one listener share one address, not {len(addresses)}")
        address = addresses.pop()
        self.close_listener(address)
        self.steer(address, sockets)
        self.open_listener(address)
        return address

    def close_listener(self, address: SocketAddress) -> None:
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
        self._put_listener(address, replace(listener, is_open=False))

    def steer(self, address: SocketAddress, sockets: Sequence[socket.socket]) -> None:
        """Steer the connections of a listener to these listening sockets of its address, and to no others any more;
        without any they are answered with RST. Raises ValueError for too many sockets, KeyError for an address that
        has no entry."""
        listener, most = self._listeners[address], abi.constants()["SOCKETS_PER_LISTENER"]
        if len(sockets) > most:
            raise ValueError(f"{len(sockets)} sockets: a listener has at most {most}")
        for index, sock in enumerate(sockets):
            self.steer_slot(address, index, sock)
        self._put_listener(address, replace(listener, sockets=len(sockets)))
        for index in range(len(sockets), listener.sockets):
            self._clear_slot(listener, index)

    def steer_slot(self, address: SocketAddress, index: int, sock: socket.socket) -> None:
        """Steer one share of a listener's connections, by its index in :meth:`steer`, to another socket. Raises
        OSError if that does not listen."""
        slot = self._slot(self._listeners[address], index)
        # Not again to the same: the kernel would take the old link of the slot for the new one, and remove both.
        if self._steered.get(slot) is not sock:
            bpf.map_update(self.maps["sockets"], slot, sock.fileno().to_bytes(8, sys.byteorder))
            self._steered[slot] = sock

    def open_listener(self, address: SocketAddress) -> None:
        """Let in to a listener whom the policy lets in. Raises KeyError for an address that has no entry."""
        self._put_listener(address, replace(self._listeners[address], is_open=True))

    def remove_listener(self, address: SocketAddress) -> None:
        """Take a listener from under the gate: all its sockets must be closed, or they serve whoever comes. Raises
        KeyError if it is not under it."""
        listener = self._listeners.pop(address)
        bpf.map_delete(self.maps["listeners"], listener.key)
        for index in range(listener.sockets):
            self._clear_slot(listener, index)

    def _put_listener(self, address: SocketAddress, listener: _Listener) -> None:
        bpf.map_update(self.maps["listeners"], listener.key, _entry(listener))
        self._listeners[address] = listener

    @staticmethod
    def _slot(listener: _Listener, index: int) -> bytes:
        return (listener.id * abi.constants()["SOCKETS_PER_LISTENER"] + index).to_bytes(4, sys.byteorder)

    def _clear_slot(self, listener: _Listener, index: int) -> None:
        self._steered.pop(self._slot(listener, index), None)
        # A socket that was closed has left the map by itself; SOCKMAP answers EINVAL then.
        with contextlib.suppress(OSError):
            bpf.map_delete(self.maps["sockets"], self._slot(listener, index))

    def is_open(self, address: SocketAddress) -> bool:
        """Whether the policy decides who gets in at an address that has an entry. Raises KeyError."""
        return self._listeners[address].is_open

    def guards(self, address: SocketAddress) -> bool:
        """Whether an address has an entry."""
        return address in self._listeners

    def listener_id(self, address: SocketAddress) -> int:
        """Return the index of a listener in the per-listener maps. Raises KeyError."""
        return self._listeners[address].id

    def accept_slot(self, address: SocketAddress) -> int:
        """Return the index, in the map ``accepted``, of worker 0 on a listener; the other workers' follow."""
        return self.listener_id(address) * abi.constants()["SOCKETS_PER_LISTENER"]

    # -- what guards -----------------------------------------------------------------------------------------------

    def mend(self, workers: Collection[int] = ()) -> Mending:
        """Look whether the programs are attached where they belong, the maps pinned and the workers, by their pids, in
        their cgroup, and put back what is not."""
        found = self.attachments.mend(workers)
        self._mend_pins(found)
        return found

    def _mend_pins(self, found: Mending) -> None:
        """Where pins are gone, or others are in their place, commands would speak to nobody, or of another policy."""
        if not self.attachments.attached or self.maps.are_pinned(self.instance.pin_dir):
            return
        try:
            bpffs.ensure_mounted()
            with self.instance.policy_lock(_LEAVE_SECONDS):
                _refuse_foreign(self.instance)
                self.instance.pin_root.mkdir(parents=True, exist_ok=True, mode=0o700)
                aside = Path(tempfile.mkdtemp(prefix="new-", dir=self.instance.pin_root))
                old = aside.with_name(aside.name.replace("new-", "old-", 1))
                try:
                    self.maps.pin(aside)
                    with contextlib.suppress(FileNotFoundError):
                        self.instance.pin_dir.rename(old)
                    aside.rename(self.instance.pin_dir)
                finally:
                    for directory in (aside, old):
                        bpffs.remove_tree(directory)
        except OSError as error:
            text = f"the policy is not pinned at {self.instance.pin_dir}, and cannot be: {error.strerror or error}"
            found.faults["pins"] = text
        else:
            found.losses.append(("pins", f"the policy was not pinned at {self.instance.pin_dir}: pinned again"))

    def cover(self, address: SocketAddress, cookies: Iterable[int], listening: Iterable[ListeningSocket]) -> Cover:
        """Say whether the sockets of a listener, by their cookies, are guarded: among those that listen in this network
        namespace, of a cgroup where the gate judges, and with an entry in it."""
        if not self.guards(address):
            return Cover(why="it has no entry in the gate")
        found = {sock.cookie: sock for sock in listening}
        cgroups: set[int | None] = set()
        for cookie in cookies:
            if cookie not in found:
                return Cover(why="a socket of it does not listen in the network namespace of the server")
            cgroups.add(found[cookie].cgroup)
        for identity in cgroups:
            why = "the kernel does not tell its cgroup" if identity is None else self.attachments.judges(identity)
            if why:
                return Cover(why=why)
        steering = ("sk_lookup",) if self.attachments.steers() else ()
        return Cover(("cgroup", *steering, *(f"XDP on {name}" for name in self.attachments.live_xdp)))

    def mend_listeners(self) -> list[SocketAddress]:
        """Put the entries of listeners, and what they are steered to, as they were meant; return which were not so."""
        wrong = []
        for address, listener in list(self._listeners.items()):
            found = bpf.map_lookup(self.maps["listeners"], listener.key, abi.LISTENER.size)
            right = found == _entry(listener)
            for index in range(listener.sockets):
                slot = self._slot(listener, index)
                sock = self._steered.get(slot)
                if sock is None or sock.fileno() < 0:
                    continue
                held = bpf.map_lookup(self.maps["sockets"], slot, 8)
                if held != sock_diag.cookie_of(sock).to_bytes(8, sys.byteorder):
                    right = False
                    with contextlib.suppress(OSError):  # it does not listen: said by cover
                        bpf.map_update(self.maps["sockets"], slot, sock.fileno().to_bytes(8, sys.byteorder))
            if not right:
                self._put_listener(address, listener)
                wrong.append(address)
        return wrong

    # -- end -----------------------------------------------------------------------------------------------------

    def close(self, *, keep_policy: bool = False) -> None:
        """Detach everything and remove the cgroup; remove the maps' pins too unless ``keep_policy``."""
        for address in list(self._listeners):
            self.remove_listener(address)
        self.detach()
        for fd in self.programs.values():
            os.close(fd)
        self.programs = {}
        self.maps.close()
        if not keep_policy:
            with _locked_if_possible(self.instance):
                _remove_pins(self.instance)

    def detach(self) -> None:
        """Detach all hooks and leave the cgroup, which is removed if it was made for this gate. May be done twice."""
        self.attachments.detach()


class AcceptCounter:
    """One slot of the map ``accepted``, written through shared memory: no system call, and no privilege."""

    def __init__(self, fd: int, index: int) -> None:
        self._memory = mmap.mmap(fd, bpf.map_info(fd).max_entries * 8)
        self._slot = memoryview(self._memory).cast("Q")[index : index + 1]

    def increment(self) -> None:
        """Count one accepted connection."""
        self._slot[0] += 1


def load(
    instance: Instance,
    *,
    sizes: MapSizes | None = None,
    kernel_headers: Path | None = None,
    xdp: bool = False,
    syn_cookies: bool = False,
    keeper: PolicyKeeper | None = None,
) -> Gate:
    """Load the programs of an instance over its maps, which are taken over from pins if there are any.

    They are compiled if no earlier start has left them (see :mod:`.kernel.programs`).

    ``xdp`` loads the XDP program too (compiler and verifier take their time, so only where it is wanted), with
    ``syn_cookies`` one that answers with the stack's SYN cookies. Where there are no pins, or some that cannot be used,
    are of other sizes than ``sizes``, or hold a policy that ``keeper`` knows to be old, new maps are made, which it
    fills before anybody sees them; what it raises leaves the pins as they are.

    The caller holds the instance's :class:`~rama_ebpf.kernel.instance.ServerLock`. Nothing is attached yet. Raises
    :class:`~rama_ebpf.kernel.compile.CompileError` or OSError; new pins are removed then.
    """
    bpffs.ensure_mounted()
    _remove_stale_cgroup(instance)
    with instance.policy_lock():
        maps, fresh = _open_or_create_maps(instance, sizes or MapSizes(), keeper)
    try:
        source = amalgamate(abi.source_dir() / "sockops_filter.c")
        wanted = [hook.program for hook in HOOKS if xdp or hook.target is not Target.INTERFACE]
        wanted.append(WITNESS_PROGRAM)
        defines = [*([] if xdp else ["-DWITHOUT_XDP"]), *(["-DSYN_COOKIES"] if syn_cookies else [])]
        unit = Unit(source, tuple(wanted), tuple(defines), kernel_headers)
        programs = load_programs(unit, maps, pins=instance.pin_dir)
    except BaseException:
        maps.close()
        if fresh:
            _remove_pins(instance)
        raise
    return Gate(instance, maps, programs, fresh=fresh)


@contextlib.contextmanager
def _locked_if_possible(instance: Instance) -> Iterator[None]:
    """Hold the policy's lock; if somebody does not let go of it go on without: nothing may stay behind."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(instance.policy_lock(_LEAVE_SECONDS))
        except PolicyBusy as error:
            log.warning("removing the pins all the same: %s", error.strerror)
        yield


def _open_or_create_maps(instance: Instance, sizes: MapSizes, keeper: PolicyKeeper | None) -> tuple[GateMaps, bool]:
    """Return the maps, and whether there were no pins that could be used."""
    _refuse_foreign(instance)
    pinned, why = None, ""
    if instance.pin_dir.is_dir():
        try:
            pinned = GateMaps.open(instance.pin_dir)
        except (FileNotFoundError, LayoutMismatch) as error:
            why = str(error)
    elif instance.pin_root.is_dir() and any(instance.pin_root.iterdir()):
        why = "they are of another version"
    if pinned is not None and (keeper is None or (pinned.sizes == sizes and not keeper.supersedes(pinned))):
        log.info("took over the policy pinned at %s", instance.pin_dir)
        # Listeners and their sockets died with the last server, and so did its links.
        for name in ("listeners", "interfaces"):
            spec = pinned.specs[name]
            for key, _ in bpf.map_lookup_batch(pinned[name], spec.key_size, spec.value_size):
                bpf.map_delete(pinned[name], key)
        return pinned, False
    try:
        return _created(instance, sizes, pinned, why, keeper), pinned is None
    finally:
        if pinned is not None:
            pinned.close()


def _created(
    instance: Instance, sizes: MapSizes, pinned: GateMaps | None, why: str, keeper: PolicyKeeper | None
) -> GateMaps:
    """Make maps aside, have them filled, and put them in place of what is pinned: others see all of them or none."""
    if pinned is not None and pinned.sizes != sizes:
        log.info("the policy pinned at %s is copied: %s, and %s is wanted", instance.pin_dir, pinned.sizes, sizes)
    instance.pin_root.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        _refuse_foreign(instance)
        aside = Path(tempfile.mkdtemp(prefix="new-", dir=instance.pin_root))
    except BaseException:
        _remove_empty(instance)
        raise
    try:
        maps = GateMaps.create(aside, sizes)
        try:
            if keeper is not None:
                keeper.fill(maps, pinned, why)
            elif why:
                log.warning("pins of instance %r cannot be taken over and are removed: %s", instance.name, why)
            old = [entry for entry in instance.pin_root.iterdir() if entry != aside]
            if instance.pin_dir.is_dir():
                old[old.index(instance.pin_dir)] = instance.pin_dir.rename(aside.with_name(f"old-{aside.name}"))
            aside.rename(instance.pin_dir)
        except BaseException:
            maps.close()
            raise
    except BaseException:
        bpffs.remove_tree(aside)
        _remove_empty(instance)
        raise
    for entry in old:  # of another layout or size, torn, or left by a start that was killed
        bpffs.remove_tree(entry)
    return maps


def _remove_empty(instance: Instance) -> None:
    for directory in (instance.pin_root, instance.pin_root.parent):
        with contextlib.suppress(OSError):  # other instances, or another user, have things in there
            directory.rmdir()


def _refuse_foreign(instance: Instance) -> None:
    """Raise PermissionError if the directory of the pins, or its parent, is somebody else's and not empty.

    As the kernel mounts it by default, anybody may make directories on a bpffs, and whoever owns one can put other maps
    in place of ours. An empty one is taken away.
    """
    for directory in (instance.pin_root, instance.pin_root.parent):
        try:
            if directory.lstat().st_uid == os.geteuid():
                continue
            directory.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            text = f"{directory} belongs to another user: remove it"
            raise PermissionError(errno.EPERM, text) from error


def _remove_pins(instance: Instance) -> None:
    _refuse_foreign(instance)  # who owns it could have us follow a link while we remove
    bpffs.remove_tree(instance.pin_root)
    with contextlib.suppress(OSError):  # other instances still have their pins beside ours
        instance.pin_root.parent.rmdir()


def _remove_stale_cgroup(instance: Instance) -> None:
    state = instance.read_state()
    former = state.get("former_cgroups")
    for recorded in (state.get("cgroup"), *(former if isinstance(former, list) else ())):
        if isinstance(recorded, str) and Path(recorded).name == instance.cgroup_name:
            try:
                cgroup.leave_and_remove(Path(recorded))
            except OSError as error:
                log.warning("left-over cgroup %s stays: %s", recorded, error.strerror)


def forget_compiled() -> None:
    """Remove the compiled programs that are kept for the next start, of all instances. Raises OSError."""
    code_cache().remove()


def unload(instance: Instance) -> None:
    """Remove everything that an instance left behind: pins, cgroup, files under /run.

    Raises :class:`~rama_ebpf.kernel.instance.InstanceBusy` while a server is running.
    """
    pid = instance.serving_pid()
    if pid is not None:
        raise InstanceBusy(instance.name, pid)
    _remove_stale_cgroup(instance)
    _remove_pins(instance)
    shutil.rmtree(instance.run_dir, ignore_errors=False) if instance.run_dir.is_dir() else None
    with contextlib.suppress(OSError):  # other instances still have their files beside ours
        instance.run_dir.parent.rmdir()

"""The life of the kernel programs: load, pin, attach, unload.

What is where, and who outlives whom:

- **Maps** are pinned under ``/sys/fs/bpf/rama-ebpf/<instance>/layout-N``, so that commands in other processes change
  them and a crash loses no policy: the next start takes them over.
- **Programs** are attached with links, and the links are held by descriptors of the server's processes alone. When they
  end, by whatever signal, the kernel detaches them; nothing of a dead server can filter, steer or leak.
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
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from .core.address import SocketAddress
from .kernel import abi, bpf, bpffs, cgroup, guard_registry
from .kernel.attachments import HOOKS, Attachments, Mending, Target
from .kernel.bindings import forget_bindings
from .kernel.compile import Unit, amalgamate
from .kernel.denials import DenialCounts
from .kernel.feed_cgroup import GrantedChild, Grants, confined_to_grants
from .kernel.gate_maps import USUAL_REJECTS, GateMaps, LayoutMismatch, MapSizes
from .kernel.holders import end_holders
from .kernel.instance import Instance, InstanceBusy, PolicyBusy
from .kernel.programs import code_cache, load_programs
from .kernel.sock_diag import ListeningSocket
from .kernel.steering import Steering
from .kernel.witness import WITNESS_PROGRAM, Witness
from .kernel.xdp import XdpAttachment

__all__ = [
    "AcceptCounter",
    "BeingStarted",
    "Cover",
    "Gate",
    "PolicyKeeper",
    "adopt",
    "forget_compiled",
    "forget_pins",
    "load",
    "open_maps",
    "unload",
]

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
        self.is_ours = True
        """Whether the end of this gate is the end of what it guards, and not the affair of another process that has
        taken it over, or is to give it to us."""
        self.fresh = fresh
        """Whether the maps were made for this gate: no policy was pinned before."""
        self.programs = programs
        self.attachments = Attachments(instance.cgroup_name, maps, programs)
        self.listeners = Steering(maps)
        self.grants = Grants(maps, lambda: self.attachments.workers_cgroups)
        self._rejects: tuple[int, int] | None = None
        self._rejects_lock = threading.Lock()

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

    def place_beside(self, pid: int) -> None:
        """Put a child that may outlive this process above its cgroup, if that is its own."""
        own = self.attachments.cgroup
        if own is not None and own.name == self.instance.cgroup_name:
            try:
                cgroup.move(pid, own.parent)
            except ProcessLookupError:
                return  # it has ended already; its end is seen elsewhere
            except OSError as error:  # controllers are shared out there: it stays with us, and the cgroup with it
                log.warning("process %d stays in %s: %s", pid, own, error.strerror)

    def confine_feed(self, pid: int, denials: DenialCounts) -> AbstractContextManager[GrantedChild]:
        """Have a child that reads a feed, and has just been started, connect to what it is granted and nowhere else."""
        return confined_to_grants(self.grants, self.attachments.workers, pid, denials)

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
        with self._rejects_lock:
            self._rejects = limit or USUAL_REJECTS
            bpf.map_update(self.maps["reject_meter"], bytes(4), abi.REJECT_METER.pack(*self._rejects, 0))

    # -- listeners -----------------------------------------------------------------------------------------------

    def add_listener(self, sockets: Sequence[socket.socket]) -> SocketAddress:
        """Put listening TCP sockets of one address under the gate, steer its connections to them, and open it.

        Returns the address. Raises ValueError for too many sockets or listeners, or sockets of several addresses.
        """
        addresses = {SocketAddress.from_sockaddr(sock.getsockname()) for sock in sockets}
        if len(addresses) != 1:
            raise ValueError(f"the sockets of one listener share one address, not {len(addresses)}")
        address = addresses.pop()
        self.listeners.close(address)
        self.listeners.steer(address, sockets)
        self.listeners.open(address)
        return address

    def remove_listener(self, address: SocketAddress) -> None:
        """Take a listener from under the gate: see :meth:`.kernel.steering.Steering.remove`."""
        self.listeners.remove(address)

    # -- what guards -----------------------------------------------------------------------------------------------

    def mend(self, workers: Collection[int] = ()) -> Mending:
        """Look whether the programs are attached where they belong, the maps pinned and the workers, by their pids, in
        their cgroup, and put back what is not."""
        found = self.attachments.mend(workers)
        self._mend_pins(found)
        self._mend_rejects(found)
        return found

    def _mend_rejects(self, found: Mending) -> None:
        with self._rejects_lock:
            raw = bpf.map_lookup(self.maps["reject_meter"], bytes(4), abi.REJECT_METER.size)
            if self._rejects is None or raw is None or abi.REJECT_METER.unpack(raw)[:2] == self._rejects:
                return
            bpf.map_update(self.maps["reject_meter"], bytes(4), abi.REJECT_METER.pack(*self._rejects, 0))
            found.losses.append(("rejects", "another program wrote how many RST are sent: put back"))

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
        if address not in self.listeners:
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
        if not steering and self.listeners.is_home(address):
            return Cover(
                why="sk_lookup is not attached to the network namespace, and what it is bound to is not steered"
            )
        return Cover(("cgroup", *steering, *(f"XDP on {name}" for name in self.attachments.live_xdp)))

    # -- end -----------------------------------------------------------------------------------------------------

    def close(self, *, keep_policy: bool = False) -> None:
        """Detach everything and remove the cgroup; remove the maps' pins too unless ``keep_policy``. If it is not ours,
        close our descriptors alone."""
        with contextlib.ExitStack() as steps:  # from the last to the first, each whatever becomes of those before it
            if not self.is_ours:
                steps.callback(self.maps.close)
                steps.callback(self._close_programs)
                steps.callback(self.attachments.release)
                return
            if not keep_policy:
                steps.callback(self._forget_policy)
            steps.callback(self.maps.close)
            steps.callback(self._close_programs)
            steps.callback(self.detach)
            for address in list(self.listeners):
                steps.callback(self.listeners.remove, address)

    def _forget_policy(self) -> None:
        with _locked_if_possible(self.instance):
            _remove_pins(self.instance)

    def _close_programs(self) -> None:
        while self.programs:
            os.close(self.programs.popitem()[1])

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
        programs = load_programs(_unit(kernel_headers, xdp, syn_cookies), maps, pins=instance.pin_dir)
    except BaseException:
        maps.close()
        if fresh:
            _remove_pins(instance)
        raise
    return Gate(instance, maps, programs, fresh=fresh)


class BeingStarted(RuntimeError):
    """A server of the instance is being started, and has not pinned its maps yet."""


def open_maps(instance: Instance, keeper: PolicyKeeper, sizes: MapSizes | None = None) -> tuple[GateMaps, bool]:
    """Open the pinned maps of an instance for programs of another process than its server; where there is no server
    either, make them, and have ``keeper`` fill them. Return whether they were made.

    Raises :class:`BeingStarted`, :class:`~rama_ebpf.kernel.gate_maps.LayoutMismatch`, OSError, or what ``keeper`` does.
    """
    bpffs.ensure_mounted()
    with instance.policy_lock():
        _refuse_foreign(instance)
        if instance.pin_dir.is_dir():
            return GateMaps.open(instance.pin_dir, instance.name), False
        if instance.serving_pid() is not None:
            raise BeingStarted
        return _created(instance, sizes or MapSizes(), None, "", keeper), True


def forget_pins(instance: Instance) -> None:
    """Remove the pins of an instance that nobody serves; what they say is on disk. Raises OSError."""
    with instance.policy_lock():
        _remove_pins(instance)


def adopt(
    instance: Instance,
    maps: GateMaps,
    *,
    kernel_headers: Path | None = None,
    xdp: bool = False,
    syn_cookies: bool = False,
) -> Gate:
    """Load the programs of an instance over maps of a server that hands it over; arguments as :func:`load` has them.

    Nothing of what is in force changes, and the gate is not ours (:attr:`Gate.is_ours`). Raises
    :class:`~rama_ebpf.kernel.compile.CompileError` or OSError; the maps stay the caller's then."""
    gate = Gate(instance, maps, load_programs(_unit(kernel_headers, xdp, syn_cookies), maps), fresh=False)
    gate.is_ours = False
    return gate


def _unit(kernel_headers: Path | None, xdp: bool, syn_cookies: bool) -> Unit:
    source = amalgamate(abi.source_dir() / "sockops_filter.c")
    wanted = [hook.program for hook in HOOKS if xdp or hook.target is not Target.INTERFACE]
    wanted.append(WITNESS_PROGRAM)
    defines = [*([] if xdp else ["-DWITHOUT_XDP"]), *(["-DSYN_COOKIES"] if syn_cookies else [])]
    return Unit(source, tuple(wanted), tuple(defines), kernel_headers)


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
            pinned = GateMaps.open(instance.pin_dir, instance.name)
        except (FileNotFoundError, LayoutMismatch) as error:
            why = str(error)
    elif instance.pin_root.is_dir() and any(instance.pin_root.iterdir()):
        why = "they are of another version"
    if pinned is not None and (keeper is None or (pinned.sizes == sizes and not keeper.supersedes(pinned))):
        log.info("took over the policy pinned at %s", instance.pin_dir)
        # Listeners and their sockets died with the last server, and so did its links and children.
        for name in ("listeners", "interfaces", "grants"):
            spec = pinned.specs[name]
            for key, _ in bpf.map_lookup_batch(pinned[name], spec.key_size, spec.value_size):
                bpf.map_delete(pinned[name], key)
        forget_bindings(pinned)
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
        maps = GateMaps.create(aside, sizes, instance.name)
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
    """Remove everything that an instance left behind: tunnels that have outlived its server, pins, cgroup, files under
    /run.

    Raises :class:`~rama_ebpf.kernel.instance.InstanceBusy` while a server is running.
    """
    pid = instance.serving_pid()
    if pid is not None:
        raise InstanceBusy(instance.name, pid, instance.doing(pid))
    end_holders(instance)
    _remove_stale_cgroup(instance)
    if instance.diversion.exists():
        from .kernel.diversion import Diversion  # which takes a quarter of a second to import

        Diversion(instance).put(())
    _remove_pins(instance)
    shutil.rmtree(instance.run_dir, ignore_errors=False) if instance.run_dir.is_dir() else None
    guard_registry.sweep(instance)
    with contextlib.suppress(OSError):  # other instances still have their files beside ours
        instance.run_dir.parent.rmdir()

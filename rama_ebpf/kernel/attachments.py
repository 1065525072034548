"""Where the programs of a gate are attached: how they get there, how it is known that they still are, and how they get
back.

All attachments are links that descriptors hold, so the kernel ends them with the processes that have these: this one,
and for what judges connections every process that listens (:attr:`Attachments.guarding`). A link
outlives what it is attached to: it is asked whether it still is, and where (``struct bpf_link_info``). What was lost is
put back by :meth:`Attachments.mend`; what cannot be is its answer.

A server that was moved to another cgroup is followed there, because sockets that it makes belong to that. The sockets
that it has made stay where they were, and so do the programs that judge them: also of a cgroup that is removed, as long
as a socket of it is open (``cgroup_bpf_offline`` in ``kernel/bpf/cgroup.c``).
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import logging
import os
import resource
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from . import abi, bpf, cgroup, netdev, xdp
from .bpf import AttachType
from .bytecode import Program
from .gate_maps import GateMaps
from .xdp import XdpAttachment, XdpError

__all__ = ["HOOKS", "Attachments", "Handed", "Hook", "Mending", "Target"]

log = logging.getLogger(__name__)

_XDP, _CGROUP_SKB, _CGROUP_SOCK, _SOCK_OPS = 6, 8, 9, 13  # enum bpf_prog_type
_SOCK_ADDR, _SOCKOPT, _SK_LOOKUP = 18, 25, 30
_NAMESPACE: Final = Path("/proc/thread-self/ns/net")


class Target(enum.Enum):
    """What a hook is attached to."""

    CGROUP = "the proxy's cgroup"
    EGRESS = "the proxy's cgroup, if it is the proxy's alone"
    WORKERS = "the workers' cgroup"
    NAMESPACE = "the network namespace"
    INTERFACE = "an interface"


@dataclass(frozen=True, slots=True)
class Hook:
    """A program and where it is attached: the table of them is the one place that says it."""

    name: str
    prog_type: int
    attach_type: AttachType
    target: Target

    @property
    def program(self) -> Program:
        return Program(self.name, self.prog_type, self.attach_type)


HOOKS: Final = (
    Hook("gate_cgroup", _CGROUP_SKB, AttachType.CGROUP_INET_INGRESS, Target.CGROUP),
    Hook("count_established", _SOCK_OPS, AttachType.CGROUP_SOCK_OPS, Target.CGROUP),
    Hook("egress_connect4", _SOCK_ADDR, AttachType.CGROUP_INET4_CONNECT, Target.EGRESS),
    Hook("egress_connect6", _SOCK_ADDR, AttachType.CGROUP_INET6_CONNECT, Target.EGRESS),
    Hook("egress_sendmsg4", _SOCK_ADDR, AttachType.CGROUP_UDP4_SENDMSG, Target.EGRESS),
    Hook("egress_sendmsg6", _SOCK_ADDR, AttachType.CGROUP_UDP6_SENDMSG, Target.EGRESS),
    Hook("egress_note_peer", _CGROUP_SKB, AttachType.CGROUP_INET_INGRESS, Target.WORKERS),
    Hook("egress_socket", _CGROUP_SOCK, AttachType.CGROUP_INET_SOCK_CREATE, Target.WORKERS),
    Hook("egress_setsockopt", _SOCKOPT, AttachType.CGROUP_SETSOCKOPT, Target.WORKERS),
    Hook("gate_lookup", _SK_LOOKUP, AttachType.SK_LOOKUP, Target.NAMESPACE),
    Hook("gate_xdp", _XDP, AttachType.XDP, Target.INTERFACE),
)
_JUDGE: Final = HOOKS[0]
_STEERING: Final = next(hook for hook in HOOKS if hook.target is Target.NAMESPACE)
_BY_INTERFACE: Final = next(hook for hook in HOOKS if hook.target is Target.INTERFACE)
_LAST: Final = "closed last: "
_MANY_DESCRIPTORS: Final = 4096
"""Above this there are no listening sockets."""
_NAMED: Final = {Target.CGROUP: "cgroup", Target.EGRESS: "egress", Target.WORKERS: "egress"}


@dataclass(slots=True)
class Mending:
    """What was found to be lost and is there again, as (hook, what happened); and what is wrong still, by what."""

    losses: list[tuple[str, str]] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Place:
    """A cgroup that this process lives or has lived in. ``workers`` is the one below it, where cgroups may be made."""

    directory: Path
    identity: int
    workers: Path | None = None
    workers_identity: int = 0
    links: dict[str, int] = field(default_factory=dict)
    judges_alone: bool = False
    """Whether it is somebody else's, and has what judges connections alone."""

    def of(self, hook: Hook) -> tuple[Path, int] | None:
        """Which cgroup a hook is attached to, with its id; None if it is not for this place."""
        if self.judges_alone:
            return (self.directory, self.identity) if hook is _JUDGE else None
        if hook.target is Target.CGROUP or (hook.target is Target.EGRESS and self.workers is not None):
            return self.directory, self.identity
        if hook.target is Target.WORKERS and self.workers is not None:
            return self.workers, self.workers_identity
        return None

    def unlink(self) -> None:
        while self.links:
            os.close(self.links.popitem()[1])


@dataclass(frozen=True, slots=True)
class Handed:
    """All attachments of a gate as another process takes them over: it is described by ``facts``, which are JSON, and
    holds links by ``descriptors``, in the order in which ``facts`` name them."""

    facts: Mapping[str, object]
    descriptors: tuple[int, ...]


@dataclass(slots=True)
class _Interface:
    """An interface that is to have XDP. ``attached`` is where it was attached last, ``live`` whether it still is."""

    name: str
    attached: XdpAttachment
    live: bool = True


class Attachments:
    """The attachments of one gate, whose cgroup is called ``cgroup_name``.

    One thread at a time uses it: the one that starts and ends the gate, and in between the one that mends.
    """

    def __init__(self, cgroup_name: str, maps: GateMaps, programs: Mapping[str, int]) -> None:
        self._name = cgroup_name
        self._maps = maps
        self._programs = programs
        self._places: list[_Place] = []
        self._steering: int | None = None
        self._steering_last: int | None = None
        self._interfaces: dict[str, _Interface] = {}
        self._program_ids: dict[str, int] = {}
        self._lending = threading.Lock()
        """Held while links are given to a process, and while any is closed: their numbers are others' then."""

    # -- attach --------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Move this process into a cgroup of its own, if that may be, and attach all hooks but XDP.

        Raises OSError; then nothing stays attached.
        """
        try:
            place = self._settle()
            if place.workers is None:
                log.info("cgroups may not be changed here: the gate is attached to %s as a whole", place.directory)
            self._steering = self._link(_STEERING, _NAMESPACE)
            self._steering_last = _closed_last(self._steering)
        except BaseException:
            self.detach()
            raise

    def _settle(self) -> _Place:
        """Enter a cgroup of our own below the one that we are in, and attach the gate to it; the last place is where
        this process is. Raises OSError."""
        directory = cgroup.enter_child(self._name)
        identity = directory.stat().st_ino
        place = next((known for known in self._places if known.identity == identity), None)
        if place is not None:
            self._places.remove(place)
            place.judges_alone = False
        else:
            place = _Place(directory, identity)
            if directory.name == self._name:
                place.workers = cgroup.make_child(directory, "workers")
                place.workers_identity = place.workers.stat().st_ino
        if place.workers is not None:
            # All are under the egress policy but what stays in our own cgroup. The programs that judge are attached to
            # ours, too: a worker's listeners, and what it accepted, belong to it.
            bpf.map_update(self._maps["server_cgroup"], bytes(4), identity.to_bytes(8, sys.byteorder))
        self._places.append(place)
        try:
            for hook in HOOKS:
                if hook.name not in place.links and (where := place.of(hook)) is not None:
                    place.links[hook.name] = link = self._link(hook, where[0])
                    if hook is _JUDGE:
                        place.links[_LAST + hook.name] = _closed_last(link)
        except BaseException:
            if len(self._places) > 1:  # those before still judge
                self._forget(place)
            raise
        return place

    def _forget(self, place: _Place) -> None:
        self._places.remove(place)
        with self._lending:
            place.unlink()

    def _link(self, hook: Hook, path: Path) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return bpf.link_create(self._programs[hook.name], fd, hook.attach_type)
        finally:
            os.close(fd)

    def attach_xdp(self, interface: str) -> XdpAttachment:
        """Attach the XDP program, which must have been loaded, to an interface. Raises
        :class:`~rama_ebpf.kernel.xdp.XdpError`; what was attached before stays."""
        attachment = xdp.attach(self._programs[_BY_INTERFACE.name], interface)
        self._interfaces[interface] = _Interface(interface, attachment)
        self._describe(attachment)
        return attachment

    def _describe(self, attachment: XdpAttachment) -> None:
        """Tell the program of an interface; it passes what comes on one that it was not told of."""
        key = attachment.index.to_bytes(4, sys.byteorder)
        bpf.map_update(self._maps["interfaces"], key, _description(attachment))

    # -- from one process to another --------------------------------------------------------------------------------

    def handed(self) -> Handed:
        """Return what another process needs to go on with all of this. It stays ours until :meth:`release`."""
        places, interfaces, links = [], [], []
        for place in self._places:
            names = [name for name in place.links if not name.startswith(_LAST)]
            links += [place.links[name] for name in names]
            workers = None if place.workers is None else str(place.workers)
            places.append(
                {
                    "directory": str(place.directory),
                    "identity": place.identity,
                    "workers": workers,
                    "workers_identity": place.workers_identity,
                    "judges_alone": place.judges_alone,
                    "links": names,
                }
            )
        if self._steering is not None:
            links.append(self._steering)
        for interface in self._interfaces.values():
            if interface.live:
                attached = interface.attached
                interfaces.append({"name": interface.name, "index": attached.index, "mode": attached.mode})
                links.append(attached.link)
        steers = self._steering is not None
        return Handed({"places": places, "steering": steers, "interfaces": interfaces}, tuple(links))

    def adopt(self, handed: Handed, interfaces: Collection[str]) -> None:
        """Go on with what another process has attached, its descriptors included, also with XDP on ``interfaces``; its
        programs stay in force until :meth:`update`. Raises OSError or :class:`~.xdp.XdpError`, and LookupError,
        TypeError or ValueError for what makes no sense; the caller closes what it was handed then."""
        facts: Any = handed.facts
        links = iter(handed.descriptors)
        known = {hook.name for hook in HOOKS}
        for row in facts["places"]:
            workers = None if row["workers"] is None else Path(row["workers"])
            place = _Place(Path(row["directory"]), int(row["identity"]), workers, int(row["workers_identity"]))
            place.judges_alone = bool(row.get("judges_alone"))
            for name in row["links"]:
                link = next(links)
                if name in known:
                    place.links[name] = link
                else:
                    os.close(link)  # of a hook that this version has not
            place.links[_LAST + _JUDGE.name] = _closed_last(place.links[_JUDGE.name])
            self._places.append(place)
        if facts["steering"]:
            self._steering = next(links)
            self._steering_last = _closed_last(self._steering)
        for row in facts["interfaces"]:
            link = next(links)
            if row["name"] in interfaces:
                attached = xdp.adopted(link, row["name"], int(row["index"]), row["mode"])
                self._interfaces[row["name"]] = _Interface(row["name"], attached)
            else:
                os.close(link)

    def update(self) -> None:
        """Put our programs into the place of those of whom all this was taken over from, or, where that has failed, of
        those who were to take it over: whatever they have changed. Raises OSError when all that can be done is done."""
        errors: list[OSError] = []
        for place in self._places:
            for hook in HOOKS:
                link, where = place.links.get(hook.name), place.of(hook)
                try:
                    if link is not None:
                        bpf.link_update(link, self._programs[hook.name])
                    elif where is not None and place is self._places[-1]:
                        place.links[hook.name] = self._link(hook, where[0])
                except OSError as error:
                    errors.append(error)
        wanted = set()
        try:
            if self._steering is not None:
                bpf.link_update(self._steering, self._programs[_STEERING.name])
        except OSError as error:
            errors.append(error)
        for interface in self._interfaces.values():
            if not interface.live:
                continue
            wanted.add(interface.attached.index.to_bytes(4, sys.byteorder))
            try:
                bpf.link_update(interface.attached.link, self._programs[_BY_INTERFACE.name])
                self._describe(interface.attached)
            except OSError as error:
                errors.append(error)
        for key, _ in bpf.map_lookup_batch(self._maps["interfaces"], 4, abi.INTERFACE.size):
            if key not in wanted:
                bpf.map_delete(self._maps["interfaces"], key)
        if errors:
            raise errors[0]

    def release(self, *, but_egress: bool = False) -> None:
        """Close our descriptors of all links, and touch nothing: another process has them, or they end with us. What
        keeps the egress policy of workers that drain stays ``but_egress``."""
        with self._lending:
            self._release(but_egress)

    def _release(self, but_egress: bool) -> None:
        self._close_beyond_cgroups()
        kept = {hook.name for hook in HOOKS if but_egress and hook.target in (Target.EGRESS, Target.WORKERS)}
        for place in self._places:
            for name in place.links.keys() - kept:
                os.close(place.links.pop(name))
        if not but_egress:
            self._places.clear()

    def _close_beyond_cgroups(self) -> None:
        """Close the links to the network namespace and to interfaces."""
        for steering in (self._steering, self._steering_last):
            if steering is not None:
                os.close(steering)
        self._steering = self._steering_last = None
        for interface in self._interfaces.values():
            if interface.live:
                os.close(interface.attached.link)
        self._interfaces.clear()

    def detach(self) -> None:
        """Detach all hooks and leave the cgroup, which is removed if it was made for this gate. May be done twice."""
        self._close_beyond_cgroups()
        while self._places:
            place = self._places.pop()
            place.unlink()
            if place.directory.name == self._name:
                try:
                    cgroup.leave_and_remove(place.directory)
                except OSError as error:
                    log.warning("cgroup %s is not empty and stays: %s", place.directory, error.strerror)

    # -- what is where -------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether the gate is attached at all."""
        return bool(self._places)

    @property
    def cgroup(self) -> Path | None:
        """The cgroup of this process while attached."""
        return self._places[-1].directory if self._places else None

    @property
    def workers(self) -> Path | None:
        """The cgroup for workers, None where cgroups may not be changed."""
        return self._places[-1].workers if self._places else None

    @property
    def workers_cgroups(self) -> tuple[Path, ...]:
        """All cgroups for workers, also those that this process was moved out of."""
        return tuple(place.workers for place in list(self._places) if place.workers is not None)

    @contextlib.contextmanager
    def guarding(self) -> Iterator[tuple[int, ...]]:
        """Yield descriptors of the links of what judges connections, and keep them open meanwhile; from any thread.

        Each process that has listening sockets holds them: whatever is killed, the gate stands for as long as one of
        them listens."""
        names = (_JUDGE.name, _LAST + _JUDGE.name)
        with self._lending:
            links = [place.links.get(name) for place in list(self._places) for name in names]
            yield tuple(fd for fd in (*links, self._steering, self._steering_last) if fd is not None)

    @property
    def former_cgroups(self) -> tuple[Path, ...]:
        """Cgroups that this process was moved out of, and that were made for it."""
        return tuple(place.directory for place in self._places[:-1] if place.workers is not None)

    @property
    def own_cgroups(self) -> frozenset[int]:
        """The ids of the cgroups that hold this proxy and nothing else: none where cgroups may not be changed."""
        places = [place for place in list(self._places) if place.workers is not None]
        return frozenset(identity for place in places for identity in (place.identity, place.workers_identity))

    @property
    def xdp(self) -> tuple[XdpAttachment, ...]:
        """Where XDP is attached, or was last."""
        return tuple(interface.attached for interface in self._interfaces.values())

    @property
    def live_xdp(self) -> tuple[str, ...]:
        """The interfaces where XDP is attached."""
        return tuple(interface.name for interface in self._interfaces.values() if interface.live)

    def judges(self, identity: int) -> str:
        """Say why the sockets of a cgroup, by its id, are not judged; empty if they are."""
        for place in self._places:
            if place.identity == identity and self._is_attached(place, _JUDGE):
                return ""
        try:
            fd = cgroup.open_by_id(identity)
        except OSError:
            return f"its socket belongs to a cgroup (id {identity}) that cannot be looked into"
        try:
            if self._reaches(fd):
                return ""
            return f"its socket belongs to cgroup {os.readlink(f'/proc/self/fd/{fd}')}, where the gate is not attached"
        finally:
            os.close(fd)

    def steers(self) -> bool:
        """Whether sk_lookup is attached to the network namespace of this thread."""
        if self._steering is None:
            return False
        link = bpf.link_info(self._steering)
        return link.target == _NAMESPACE.stat().st_ino and link.prog_id == self._program_id(_STEERING)

    def _reaches(self, fd: int) -> bool:
        """Whether a cgroup, by its descriptor, is judged by ours: it, or one above it, has the program."""
        return self._program_id(_JUDGE) in bpf.effective_programs(fd, _JUDGE.attach_type)

    def _is_attached(self, place: _Place, hook: Hook) -> bool:
        where, link = place.of(hook), place.links.get(hook.name)
        if where is None or link is None:
            return False
        found = bpf.link_info(link)
        return found.target == where[1] and found.prog_id == self._program_id(hook)

    def _program_id(self, hook: Hook) -> int:
        if hook.name not in self._program_ids:
            self._program_ids[hook.name] = bpf.prog_info(self._programs[hook.name]).id
        return self._program_ids[hook.name]

    def _takes_back(self, hook: Hook, link: int | None, target: int) -> bool:
        """Put our program in place of another one that somebody has put into a link of ours; return whether that was
        what is wrong."""
        if link is None:
            return False
        found = bpf.link_info(link)
        if found.target != target or found.prog_id == self._program_id(hook):
            return False
        bpf.link_update(link, self._programs[hook.name])
        return True

    # -- mend ----------------------------------------------------------------------------------------------------

    def mend(self, workers: Collection[int] = ()) -> Mending:
        """Look whether all is where it belongs, and put back what is not; ``workers`` are the pids of those that must
        be in a cgroup of ours."""
        found = Mending()
        if not self._places:
            return found
        # First: in another namespace it would drop what is none of our business.
        for interface in self._interfaces.values():
            self._mend_interface(interface, found)
        self._follow(found)
        for place in list(self._places):
            self._mend_place(place, found)
        self._mend_steering(found)
        self._mend_exemption(found)
        self._mend_descriptions(found)
        for pid in workers:
            self._mend_worker(pid, found)
        return found

    def judge_above(self, cgroups: Collection[int | None], found: Mending) -> None:
        """Judge for the cgroup above ours, too, while it is one of ``cgroups``, those of our listening sockets: they
        were made while this process had to stay there, and belong to it for good."""
        if not self._places or self._places[-1].workers is None:
            return
        above = self._places[-1].directory.parent
        try:
            identity = above.stat().st_ino
            for place in [one for one in self._places if one.judges_alone and one.identity not in cgroups]:
                bpf.link_detach(place.links[_JUDGE.name])  # workers that were started meanwhile hold it
                self._forget(place)
            if identity not in cgroups or any(one.identity == identity for one in self._places):
                return
            fd = os.open(above, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if self._reaches(fd):
                    return
            finally:
                os.close(fd)
            place = _Place(above, identity, judges_alone=True)
            place.links[_JUDGE.name] = link = self._link(_JUDGE, above)
            place.links[_LAST + _JUDGE.name] = _closed_last(link)
        except OSError as error:
            found.faults["cgroup"] = f"listeners' sockets belong to {above}, and are not judged: {error.strerror}"
            return
        self._places.insert(0, place)
        found.losses.append(("cgroup", f"listeners' sockets belong to {above}: {_JUDGE.name} is attached there, too"))

    def _mend_exemption(self, found: Mending) -> None:
        """Whose cgroup is free of the egress policy."""
        place = self._places[-1]
        wanted = place.identity.to_bytes(8, sys.byteorder)
        if place.workers is not None and bpf.map_lookup(self._maps["server_cgroup"], bytes(4), 8) != wanted:
            bpf.map_update(self._maps["server_cgroup"], bytes(4), wanted)
            found.losses.append(("egress", "another program wrote which cgroup has no egress policy: put back"))

    def _mend_descriptions(self, found: Mending) -> None:
        """What the program is told of interfaces: where it may send, and by which hardware address it knows its own."""
        wanted = {
            interface.attached.index.to_bytes(4, sys.byteorder): _description(interface.attached)
            for interface in self._interfaces.values()
            if interface.live
        }
        present = dict(bpf.map_lookup_batch(self._maps["interfaces"], 4, abi.INTERFACE.size))
        if present == wanted:
            return
        for key, value in wanted.items():
            bpf.map_update(self._maps["interfaces"], key, value)
        for key in present.keys() - wanted.keys():
            bpf.map_delete(self._maps["interfaces"], key)
        found.losses.append(("xdp", "another program wrote what XDP is told of interfaces: put back"))

    def _mend_worker(self, pid: int, found: Mending) -> None:
        """Sockets that a worker makes belong to its cgroup: elsewhere no egress policy holds for them."""
        home = self._places[-1].workers
        if home is None:
            return
        try:
            own = cgroup.own_cgroup(pid)
            if own.stat().st_ino in self.own_cgroups:
                return
            cgroup.move(pid, home)
        except (FileNotFoundError, ProcessLookupError):
            return  # it has ended
        except OSError as error:
            found.faults["egress"] = f"worker {pid} is not in {home}, and cannot be put there: {error.strerror}"
        else:
            found.losses.append(("egress", f"worker {pid} was moved to {own}: moved back to {home}"))

    def _follow(self, found: Mending) -> None:
        """Attach the gate where this process was moved to."""
        before = self._places[-1]
        try:
            own = cgroup.own_cgroup()
            fd = os.open(own, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_ino == before.identity:
                    return
                below = self._reaches(fd)
            finally:
                os.close(fd)
            if below and before.workers is None:
                return
            if below:  # a second gate there would judge, and charge, twice
                cgroup.move_here(before.directory)
            place = self._settle()
            if place is not before and before.workers is not None:
                self._bring(before, place)
        except OSError as error:
            text = f"the server is not in {before.directory} any more, and not guarded where it is: {error.strerror}"
            found.faults["cgroup"] = text
        else:
            text = f"the server was moved from {before.directory} to {own}: the gate is attached to {place.directory}"
            found.losses.append(("cgroup", text))

    @staticmethod
    def _bring(before: _Place, place: _Place) -> None:
        """Have those that were left behind follow: workers, and our other children."""
        cgroup.move_all(before.directory, place.directory)
        if before.workers is not None:
            cgroup.move_all(before.workers, place.workers or place.directory)

    def _mend_place(self, place: _Place, found: Mending) -> None:
        if place is not self._places[-1]:
            if place.workers is not None:
                cgroup.remove_if_empty(place.directory)
            if not place.directory.is_dir():
                if not self._is_attached(place, _JUDGE):  # the last socket of it has been closed
                    self._forget(place)
                return
        for hook in HOOKS:
            where = place.of(hook)
            if where is None or self._is_attached(place, hook):
                continue
            label, directory = _NAMED[hook.target], where[0]
            try:
                if self._takes_back(hook, place.links.get(hook.name), where[1]):
                    text = f"another program was put in place of {hook.name} at {directory}: put back"
                    found.losses.append((label, text))
                    continue
                if hook.target is Target.WORKERS and not directory.is_dir():
                    directory.mkdir()
                    place.workers_identity = directory.stat().st_ino
                link = self._link(hook, directory)
            except OSError as error:
                text = f"{hook.name} is detached from {directory}, and cannot be attached again: {error.strerror}"
                found.faults[label] = text
                continue
            for name in (_LAST + hook.name, hook.name):
                if name in place.links:
                    _replace(link, place.links[name], own_file=name.startswith(_LAST))
            if hook.name in place.links:
                os.close(link)
            else:
                place.links[hook.name] = link
            found.losses.append((label, f"{hook.name} was detached from {directory}: attached again"))

    def _mend_steering(self, found: Mending) -> None:
        if self.steers():
            return
        try:
            if self._takes_back(_STEERING, self._steering, _NAMESPACE.stat().st_ino):
                text = f"another program was put in place of {_STEERING.name} in the network namespace: put back"
                found.losses.append(("sk_lookup", text))
                return
            link = self._link(_STEERING, _NAMESPACE)
        except OSError as error:
            text = f"{_STEERING.name} is detached, and cannot be attached again: {error.strerror}"
            found.faults["sk_lookup"] = text
            return
        for steering in (self._steering, self._steering_last):
            if steering is not None:
                _replace(link, steering, own_file=steering == self._steering_last)
        if self._steering is None:
            self._steering = link
        else:
            os.close(link)
        found.losses.append(("sk_lookup", f"{_STEERING.name} was detached from the network namespace: attached again"))

    def _mend_interface(self, interface: _Interface, found: Mending) -> None:
        name, attached = interface.name, interface.attached
        label = f"XDP on {name}"
        if interface.live:
            device = netdev.link(attached.index)
            if device is not None and device.program == self._program_id(_BY_INTERFACE):
                self._keep_interface(interface, device.name)
                return
            gone = "it was removed" if device is None else "it was detached"
            if bpf.link_info(attached.link).ifindex:
                gone = "the interface went to another network namespace, and it was detached there"
            bpf.map_delete(self._maps["interfaces"], attached.index.to_bytes(4, sys.byteorder))
            os.close(attached.link)
            interface.live = False
            found.losses.append(("xdp", f"{label}: {gone}"))
        try:
            interface.attached = xdp.attach(self._programs[_BY_INTERFACE.name], name)
            interface.live = True
            self._describe(interface.attached)
        except (XdpError, OSError) as error:
            found.faults[label] = str(error)
        else:
            found.losses.append(("xdp", f"{label}: attached again, {interface.attached.mode}"))

    def _keep_interface(self, interface: _Interface, name: str) -> None:
        """What the program was told of an interface, which is called ``name`` now, may have changed."""
        with contextlib.suppress(XdpError, OSError):  # it has just gone: the next look finds that
            hardware, why, answers = xdp.traits(name, interface.attached.index, interface.attached.mode)
            now = replace(interface.attached, hardware=hardware, why_silent=why, answers=answers)
            if now != interface.attached:
                interface.attached = now
                self._describe(now)


def _description(attachment: XdpAttachment) -> bytes:
    return abi.INTERFACE.pack(attachment.hardware, attachment.answers)


def _closed_last(link: int) -> int:
    """Return another descriptor of a link, with a high number, and of a file of its own.

    The kernel closes the descriptors of a killed process by their numbers, and then lets go of what nobody has open any
    more, the last first (task_work_run in kernel/task_work.c) or the first first: a link that has a file before all
    sockets and one after them stays until these are closed.
    """
    limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _MANY_DESCRIPTORS)
    file = _another_file(link)
    try:
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, max(3, limit - 2 * len(HOOKS)))
    finally:
        os.close(file)


def _another_file(link: int) -> int:
    """Return a descriptor of the same link, but not of the same file: duplicates of one are let go of together."""
    return bpf.link_by_id(bpf.link_info(link).id)


def _replace(link: int, number: int, *, own_file: bool) -> None:
    """Have a descriptor be one of this link from now on, in one step: workers may be given it just now."""
    if not own_file:
        os.dup2(link, number, inheritable=False)
        return
    file = _another_file(link)
    try:
        os.dup2(file, number, inheritable=False)
    finally:
        os.close(file)

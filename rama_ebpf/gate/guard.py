"""Listeners of other programs under the policy of an instance: pre-accept filtering without the proxy.

What is guarded is named; the rest of the host pays the look at a socket's state. The guard ends with its process, by
whatever signal, and the listeners are as they were then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, Protocol

from .. import loader
from ..control.host_policy import GateUnavailable as PolicyUnavailable
from ..control.host_policy import HostPolicy
from ..core.address import IPAddress, SocketAddress, unmap
from ..kernel import bpf, sock_diag
from ..kernel.gate_maps import GateMaps, LayoutMismatch
from ..kernel.guard_registry import GuardEntry, GuardTaken, guarding_pids, sweep
from ..kernel.host_guard import HostGuard, namespace_cookie
from ..kernel.instance import Instance
from ..policy.kernel_store import KernelStore
from ..policy.prefixes import IPNetwork
from ..policy.rule import PolicyError, parse_network
from .errors import GateError, GateFailed, GateUnavailable, GuardRefused, told
from .sessions import own_sessions

__all__ = ["Guard", "GuardedListener"]

log = logging.getLogger("rama_ebpf.guard")

_LOOK_SECONDS: Final = 1.0
_MISSES: Final = 3
_SO_NETNS_COOKIE: Final = 71
_ANY: Final = (IPv4Address("0.0.0.0"), IPv6Address("::"))


class HasDescriptor(Protocol):
    """A socket of any kind: of :mod:`socket`, or what servers of asyncio and uvloop list."""

    def fileno(self) -> int: ...


GuardedListener = HasDescriptor | int | tuple[str, int]
"""A listening socket, a port of this network namespace, or an (address, port) of it."""


class Guard:
    """Listeners under a guard. Made by :meth:`.sync.SyncGate.guard`; a context manager.

    It follows the policy where a server of the instance makes the maps anew. It ends by itself, and says so in the log
    and by :meth:`wait`, when the policy is unloaded, or the failsafe covers its caller's session no longer.
    """

    def __init__(
        self, instance: Instance, listeners: Sequence[GuardedListener], *, failsafe: Sequence[str] = ()
    ) -> None:
        if not listeners:
            raise ValueError("nothing to guard: name a port, an (address, port) or a listening socket")
        places = [place for listener in listeners for place in _places(listener)]
        self.instance = instance
        self.ports: tuple[int, ...] = tuple(dict.fromkeys(address.port for _, address in places))
        """The ports under the guard."""
        wanted = [parse_network(text) for text in _texts(failsafe)]
        self._sessions = _sessions(self.ports) if any(place == namespace_cookie() for place, _ in places) else []
        self._ended: GateError | None = None
        self._over = threading.Event()
        self._closing = threading.Lock()
        with contextlib.ExitStack() as undo:
            self._entries = _taken(instance, places, undo)
            self._refuse_own(places)
            self._maps, self._fresh = _opened(instance)
            undo.callback(self._let_go)
            self._store = KernelStore(instance, self._maps)
            if self._fresh:
                self._store.restore_bans()
            self._keep_open(wanted)
            self._refuse_lockout()
            self._host = HostGuard(self._maps)
            undo.callback(self._host.close)
            for namespace, address in places:
                self._host.guard(namespace, [address])
            self._host.attach()
            undo.pop_all()
        self._thread = threading.Thread(target=self._watch, name="rama-ebpf-guard", daemon=True)
        self._thread.start()

    # -- before it begins ----------------------------------------------------------------------------------------

    def _refuse_own(self, places: Sequence[tuple[int, SocketAddress]]) -> None:
        """Raise :class:`GuardRefused` for a listener of the instance's own server: that is judged already."""
        state = self.instance.read_state() if self.instance.serving_pid() else {}
        directory = state.get("cgroup")
        if not isinstance(directory, str):
            return
        with contextlib.suppress(OSError):
            ours = Path(directory).stat().st_ino
            found = {sock.port for sock in sock_diag.listening() if sock.cgroup == ours}
            for _, address in places:
                if address.port in found:
                    raise GuardRefused(
                        f"port {address.port} is a listener of the server of instance {self.instance.name!r}, which "
                        "has it under the gate already: guard others"
                    )

    def _keep_open(self, wanted: Sequence[IPNetwork]) -> None:
        if not wanted:
            return
        present = self._store.failsafe()
        missing = [network for network in wanted if not any(_covers(one, network) for one in present)]
        if missing and self.instance.serving_pid() is not None:
            raise GuardRefused(
                f"the failsafe of instance {self.instance.name!r} is its server's, and lacks {missing[0]}: start that "
                f"with rama-ebpf run --failsafe {missing[0]}"
            )
        if missing:
            ports = self._store.failsafe_ports()
            self._store.set_failsafe([*present, *missing], ports)
            self._store.sync()

    def _refuse_lockout(self) -> None:
        if (peer := self._shut_out()) is not None:
            network = f"{peer}/{peer.max_prefixlen}"
            raise GuardRefused(
                f"your own session comes from {peer}, and nothing in the policy keeps it open: name its network with "
                f"--failsafe (failsafe=[...]), for example --failsafe {network}; where a server runs, start that with "
                f"rama-ebpf run --failsafe {network}"
            )

    def _shut_out(self) -> IPAddress | None:
        """A peer of the caller's own sessions that the failsafe does not cover, if there is one."""
        networks, ports = self._store.failsafe(), self._store.failsafe_ports()
        if set(self.ports) <= set(ports):
            return None
        return next((peer for peer in self._sessions if not any(peer in network for network in networks)), None)

    # -- while it lasts ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        misses = 0
        while not self._over.wait(_LOOK_SECONDS):
            try:
                with self._closing:
                    if self._over.is_set():
                        return
                    misses = 0 if self._follow() else misses + 1
                    if misses >= _MISSES:
                        name = self.instance.name
                        self._end(GateUnavailable(f"the policy of instance {name!r} was unloaded: the guard has ended"))
                    elif (peer := self._shut_out()) is not None:
                        text = f"the failsafe covers your session from {peer} no longer: the guard has ended"
                        self._end(GuardRefused(text))
            except Exception as error:  # noqa: BLE001  whatever it is, nobody is locked out by a guard that sees nothing
                with self._closing:
                    self._end(GateFailed(f"the guard cannot look after its policy any more, and has ended: {error}"))

    def _follow(self) -> bool:
        """Use the maps that are pinned now. Return whether there are any."""
        try:
            pinned = bpf.obj_get(str(self.instance.pin_dir / "gate"))
        except FileNotFoundError:
            return False
        try:
            same = bpf.map_info(pinned).id == bpf.map_info(self._maps["gate"]).id
        finally:
            bpf.close(pinned)
        if same:
            return True
        try:
            maps = GateMaps.open(self.instance.pin_dir, self.instance.name)
        except (FileNotFoundError, LayoutMismatch):
            return False
        try:
            self._host.use(maps)
        except BaseException:
            maps.close()
            raise
        self._maps.close()
        self._maps, self._fresh = maps, False
        self._store = KernelStore(self.instance, maps)
        log.info("the policy of instance %r was made anew: the guard follows it", self.instance.name)
        return True

    def _end(self, error: GateError) -> None:
        self._ended = error
        log.error("ports %s are guarded no longer: %s", ", ".join(map(str, self.ports)), error)
        self._detach()

    def _detach(self) -> None:
        self._over.set()
        self._host.close()
        for entry in self._entries:
            entry.close()
        self._let_go()

    def _let_go(self) -> None:
        """Close the maps. Those that were made for this guard go, if nobody else uses them; all is on disk."""
        with contextlib.suppress(AttributeError):
            self._store.sync()
        self._maps.close()
        if self._fresh and self.instance.serving_pid() is None and not guarding_pids(self.instance):
            loader.forget_pins(self.instance)

    @property
    def active(self) -> bool:
        """Whether it guards."""
        return not self._over.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, ``timeout`` seconds at most; return whether it has. Raises what has ended it, if it
        was not :meth:`close`."""
        over = self._over.wait(timeout)
        if self._ended is not None:
            raise self._ended
        return over

    async def aclose(self) -> None:
        """:meth:`close`, on an event loop."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End it: the listeners are as they were. May be called twice. It waits, so not on an event loop."""
        with self._closing, told():
            if not self._over.is_set():
                self._detach()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Guard:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()


def _texts(failsafe: object) -> Sequence[str]:
    if isinstance(failsafe, str) or not isinstance(failsafe, Sequence):
        raise TypeError("failsafe is a list of networks: write for example failsafe=['192.0.2.0/24']")
    return [str(network) for network in failsafe]


def _places(listener: object) -> list[tuple[int, SocketAddress]]:
    """Return (network namespace, address) of what is to be guarded."""
    descriptor = getattr(listener, "fileno", None)
    if callable(descriptor):
        with socket.socket(fileno=os.dup(descriptor())) as sock:
            return _of_socket(sock)
    address: object = None
    port: object = listener
    if isinstance(listener, tuple) and len(listener) == 2:
        address, port = listener
    if isinstance(port, bool) or not isinstance(port, int) or not isinstance(address, str | None):
        raise TypeError(
            f"a listener is a socket, a port, or an (address, port), not {listener!r:.60}: write for example guard(22)"
        )
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port}: use 1 to 65535")
    ip = None if address is None else unmap(ip_address(address))
    every = ip is None or ip == _ANY[1]
    return [(namespace_cookie(), SocketAddress(one, port)) for one in (_ANY if every else (ip,)) if one is not None]


def _of_socket(sock: socket.socket) -> list[tuple[int, SocketAddress]]:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise TypeError(f"a guard is of TCP sockets, not of {sock.family.name} {sock.type.name}")
    address = SocketAddress.from_sockaddr(sock.getsockname())
    if address.port == 0:
        raise ValueError("the socket has no port yet: bind it before it is guarded")
    namespace = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)
    both = (
        sock.family == socket.AF_INET6
        and address.ip.is_unspecified
        and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    )
    return [(namespace, SocketAddress(ip, address.port)) for ip in (_ANY if both else (address.ip,))]


def _sessions(ports: Iterable[int]) -> list[IPAddress]:
    return list(dict.fromkeys(peer for port in ports for peer in own_sessions(port)))


def _taken(
    instance: Instance, places: Sequence[tuple[int, SocketAddress]], undo: contextlib.ExitStack
) -> list[GuardEntry]:
    sweep(instance)
    entries = []
    for namespace, port in dict.fromkeys((namespace, address.port) for namespace, address in places):
        try:
            entries.append(GuardEntry(instance, namespace, port))
        except GuardTaken as error:
            raise GuardRefused(str(error)) from None
        undo.callback(entries[-1].close)
    return entries


def _opened(instance: Instance) -> tuple[GateMaps, bool]:
    """Open the maps of the instance, or make them of what is on disk; return whether they were made."""
    deadline = time.monotonic() + 10.0
    while True:
        try:
            return loader.open_maps(instance, HostPolicy(instance))
        except loader.BeingStarted as error:
            if time.monotonic() >= deadline:
                raise GateUnavailable(f"instance {instance.name!r} is being started: try again soon") from error
            time.sleep(0.1)  # no event tells when another process has pinned its maps
        except (LayoutMismatch, PolicyUnavailable, PolicyError) as error:
            raise GateUnavailable(f"the policy of instance {instance.name!r} cannot be used: {error}") from error


def _covers(wide: IPNetwork, narrow: IPNetwork) -> bool:
    return wide.version == narrow.version and narrow.subnet_of(wide)  # type: ignore[arg-type]  # of one version

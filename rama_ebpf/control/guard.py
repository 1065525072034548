"""Whether the gate guards what it is said to guard: looked at when something changes, and each minute.

A probe asks the kernel: are the programs attached where they belong, the maps pinned, and does each listener's socket
belong to where they are? What was lost is put back, logged and counted. A listener that is not guarded is closed until
it is, unless the operator wrote that its gate is optional; what cannot be put back is said by ``status``, ``doctor``
and ``/ready`` for as long as it is so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from ..core.address import SocketAddress
from ..kernel import netdev, sock_diag
from ..kernel.attachments import Mending
from ..kernel.own_addresses import own_addresses
from ..kernel.sock_diag import ListeningSocket
from ..loader import Cover, Gate
from .listeners import Listeners, Watched
from .sockets import OpenListener, stolen_from

__all__ = ["Guard"]

log = logging.getLogger("rama_ebpf")

_PROBE_SECONDS: Final = 60.0
_AGAIN_SECONDS: Final = 5.0
"""How soon it is tried again to mend what could not be."""
_QUIET_SECONDS: Final = 0.02
_QUIET_SHARE: Final = 10
"""Changes come in crowds: between two probes is so much time, and so many times that which a probe took."""


class Guard:
    """Probes the ``gate`` of a server, None where it has none, for its ``listeners`` and ``workers``, by their pids.

    ``losses`` counts by hook what was found to be lost; ``faults`` is what is wrong now, by hook. ``on_change`` is
    called when what a probe found is not what the one before did.
    """

    def __init__(
        self,
        gate: Gate | None,
        listeners: Listeners,
        workers: Callable[[], Collection[int]],
        on_change: Callable[[], None],
    ) -> None:
        self.losses: Counter[str] = Counter()
        self.faults: dict[str, str] = {}
        self._gate = gate
        self._listeners = listeners
        self._workers = workers
        self._on_change = on_change
        self._resting = False
        self._said: dict[str, str] = {}
        self._turn = asyncio.Lock()
        # Of its own: whatever else holds up threads, the gate is looked at.
        self._thread = ThreadPoolExecutor(1, "guard")

    def close(self) -> None:
        """End. A probe that is under way is waited for: nothing is attached after this."""
        self._thread.shutdown(cancel_futures=True)

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong now: faults by hook, and listeners that are closed because they are not guarded, by address."""
        return self.faults | self._listeners.shut()

    async def watch(self) -> None:
        """Probe whenever an interface or an address of this network namespace changes, and each minute."""
        if self._gate is None:
            return
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        with contextlib.ExitStack() as cleanup:
            try:
                sock = cleanup.enter_context(netdev.changes())
            except OSError as error:
                log.warning("gate: changes of interfaces are seen each minute only: no netlink (%s)", error.strerror)
            else:
                loop.add_reader(sock, _drain, sock, changed)
                cleanup.callback(loop.remove_reader, sock)
            while True:
                began = loop.time()
                await self.probe()
                await asyncio.sleep(max(_QUIET_SECONDS, _QUIET_SHARE * (loop.time() - began)))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_AGAIN_SECONDS if self.problems else _PROBE_SECONDS):
                        await changed.wait()
                changed.clear()

    async def rest(self) -> None:
        """Look no more, until :meth:`wake`: another server may have its hands on what the gate is attached to."""
        self._resting = True
        async with self._turn:
            pass

    def wake(self) -> None:
        """Look again."""
        self._resting = False

    async def probe(self) -> None:
        """Look now, and open and close listeners as that says."""
        if self._gate is None:
            return
        async with self._turn:
            if self._resting:
                return
            loop, before = asyncio.get_running_loop(), self._state()
            watched = self._listeners.watched()
            held = self._listeners.held.cookies
            found, covers = await loop.run_in_executor(self._thread, _look, self._gate, self._workers(), watched, held)
            for hook, text in found.losses:
                self.losses[hook] += 1
                log.warning("gate: %s", text)
            self.faults = found.faults
            if wrong := self._listeners.judge(covers):
                self.losses["listeners"] += wrong
            self._say()
            if found.losses or self._state() != before:
                self._on_change()

    def _state(self) -> tuple[Mapping[str, str], list[dict[str, object]]]:
        return self.faults, self._listeners.described()

    def _say(self) -> None:
        """Log each problem once, and its end."""
        faults, shut = dict(self.faults), self._listeners.shut()
        now = {f"gate: {what}": f"{text}" for what, text in faults.items()}
        now |= {f"listener {address}": f"CLOSED, it is not guarded: {why}" for address, why in shut.items()}
        for what, text in now.items():
            if self._said.get(what) != text:
                log.error("%s: %s (rama-ebpf doctor)", what, text)
        for what in self._said.keys() - now.keys():
            log.info("%s: in order again", what)
        self._said = now


def _look(
    gate: Gate, workers: Collection[int], watched: list[Watched], held: Collection[int]
) -> tuple[Mending, dict[OpenListener, Cover]]:
    """What a probe finds, in a thread. ``held`` are cookies of sealed sockets that keep addresses for us."""
    found = Mending()
    try:
        found = gate.mend(workers)
        listening = [one for one in sock_diag.listening() if one.cookie not in held]
        here = [one for one in listening if any(one.meets(at.address.ip, at.address.port) for at in watched)]
        gate.attachments.judge_above({one.cgroup for one in here}, found)  # those of workers that drain included
        _look_for_others(watched, listening, found)
        _look_for_stolen(watched, listening, found)
        return found, {one.listener: gate.cover(one.address, one.cookies, listening) for one in watched}
    except OSError as error:  # out of descriptors, say: what was known of listeners stands, new ones stay closed
        found.faults["probe"] = f"the gate cannot be looked at: {error.strerror or error}"
        return found, {}


def _look_for_others(watched: list[Watched], listening: list[ListeningSocket], found: Mending) -> None:
    """Somebody of our user may share an address with us after we began to listen (SO_REUSEPORT)."""
    ours = {cookie for one in watched for cookie in one.cookies}
    for one in watched:
        for other in listening:
            if other.cookie in ours or not other.meets(one.address.ip, one.address.port):
                continue
            if not sock_diag.has_socket(os.getpid(), other.inode):  # else it was opened a moment ago
                where = SocketAddress(other.address, other.port)
                text = (
                    f"{sock_diag.owner_of(other.inode)} listens at {where}, too: which of us a client reaches is open"
                )
                found.faults[f"address {one.address}"] = text


def _look_for_stolen(watched: list[Watched], listening: list[ListeningSocket], found: Mending) -> None:
    """Somebody may have begun to listen where connections are steered to us."""
    bindings = [binding for one in watched for binding in one.bindings]
    if not bindings:
        return
    ours = {cookie for one in watched for cookie in one.cookies}
    others = [other for other in listening if other.cookie not in ours]
    if taken := stolen_from(bindings, others, own_addresses()):
        found.faults["bindings"] = taken


def _drain(sock: socket.socket, changed: asyncio.Event) -> None:
    changed.set()
    with contextlib.suppress(OSError):  # empty, or some were lost (ENOBUFS): that something changed is all we need
        while sock.recv(1 << 16):
            pass

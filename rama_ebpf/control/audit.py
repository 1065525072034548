"""The audit: the server looks, all the time, whether the kernel's tables, the policy and the programs say the same.

Every few seconds a slice, small enough to cost a thousandth of a CPU; every rule within an hour, all within a minute
where they are few. What differs is put in order, logged and counted, and the server is not ready for a minute.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ..core.address import IPAddress, SocketAddress
from ..core.errors import RamaError
from ..policy.integrity import Difference, EgressCheck, Integrity
from ..policy.kernel_store import KernelStore
from ..policy.rule import PolicyError
from .enforced import KernelJudge
from .policy_thread import PolicyThread

__all__ = ["Audit"]

log = logging.getLogger("rama_ebpf")

_SECONDS: Final = 10.0
_ROUNDS: Final = 3600 // 10
"""Slices in which all entries are looked at: an hour."""
_LEAST: Final = 200
"""Entries of a slice at least: with so few that six slices hold them, all are looked at within a minute."""
_SAMPLE: Final = 1
_PORT: Final = 1080
"""The port to ask about where nobody listens."""
_UNREADY_SECONDS: Final = 60.0


class Audit:
    """Looks and mends. ``changed`` is called on the event loop when there is something new to tell."""

    def __init__(
        self,
        store: KernelStore,
        judge: KernelJudge,
        integrity: Integrity,
        changed: Callable[[], None],
        egress: EgressCheck | None = None,
    ) -> None:
        self._store = store
        self._judge = judge
        self._integrity = integrity
        self._changed = changed
        self._egress = egress
        self._standing: dict[str, Difference] = {}
        self._last: tuple[float, str] | None = None
        self._since = 0.0
        self.disagreements = 0
        """How many were found since the start."""
        store.tell_of_disagreements(self._mended)

    async def watch(self, thread: PolicyThread) -> None:
        """Look, for ever, in the thread that changes the policy: a stop does not wait for it if it is held up."""
        told: object = None
        hindered = ""
        while True:
            await asyncio.sleep(_SECONDS)
            try:
                await thread.run(self.look)
                hindered = ""
            except (RamaError, OSError) as error:
                if not hindered:
                    log.warning("the audit of the policy is hindered, and tried again: %s", error)
                hindered = str(error)
            if told != (state := (self.disagreements, self.problems)):
                told = state
                self._changed()

    def look(self) -> None:
        """Look at the next slice, and mend what differs. It waits for locks and the kernel."""
        for difference in list(self._standing.values()):
            self._settle(difference)
        for difference in self._integrity.look(_LEAST, _ROUNDS):
            if difference.what not in self._standing:
                self._settle(difference)
        for difference in self._sample():
            self._settle(difference)
        if self._egress is not None:
            for difference in self._egress.look():
                if difference.what not in self._standing:
                    self._settle(difference)

    def _mended(self, what: str) -> None:
        """Somebody else has found something, and put it in order."""
        self.disagreements += 1
        self._last, self._since = (time.time(), what), time.monotonic()
        log.error("the policy in the kernel was not what it is to be, and is again: %s", what)

    def _settle(self, difference: Difference) -> None:
        if not self._persists(difference):
            self._standing.pop(difference.what, None)
            return
        known = difference.what in self._standing
        try:
            difference.mend()
            why = "" if not self._persists(difference) else "it could not be put in order"
        except (PolicyError, OSError) as error:
            why = f"it could not be put in order: {error}"
        if not why:
            if self._standing.pop(difference.what, None) is None:
                self._mended(difference.what)
            else:
                log.warning("the policy in the kernel is what it is to be again: %s", difference.what)
            return
        self._standing[difference.what] = difference
        self._since = time.monotonic()
        if not known:
            self.disagreements += 1
            self._last = time.time(), difference.what
            log.critical("the policy in the kernel is not what it is to be: %s; %s", difference.what, why)

    def _persists(self, difference: Difference) -> bool:
        with self._store.held():
            return difference.persists()

    # -- what `test` says ----------------------------------------------------------------------------------------

    def _sample(self) -> list[Difference]:
        """Ask about some sources at random, near rules and anywhere, what ``test`` says and what the programs do."""
        ports = [at.port for at in self._judge.listeners()] or [_PORT]
        asked = [
            (source, SocketAddress(_any(source), random.choice(ports)))
            for source in (*self._integrity.some_sources(_SAMPLE), _anywhere())
        ]
        return [self._about(*pair) for pair in self._differing(asked)]

    def _differing(self, asked: Sequence[tuple[IPAddress, SocketAddress]]) -> list[tuple[IPAddress, SocketAddress]]:
        return [
            (decision.source, decision.target)
            for decision in self._judge.decide(asked)
            if decision.verdict != self._store.verdict(decision.source, decision.target.port)
        ]

    def _about(self, source: IPAddress, target: SocketAddress) -> Difference:
        pair = (source, target)
        return Difference(
            "verdict",
            f"the programs decide otherwise than the rules say for {source} to port {target.port}",
            lambda: bool(self._differing([pair])),
            lambda: self._derive_anew(pair),
        )

    def _derive_anew(self, pair: tuple[IPAddress, SocketAddress]) -> None:
        self._store.rebuild()
        if self._differing([pair]):
            self._integrity.load_again()

    # -- what is told --------------------------------------------------------------------------------------------

    @property
    def problems(self) -> dict[str, str]:
        """What is not in order, or was not until a minute ago, in words."""
        if self._standing:
            return {"policy": f"the kernel does not have what was asked for: {'; '.join(list(self._standing)[:3])}"}
        if self._last is not None and time.monotonic() - self._since < _UNREADY_SECONDS:
            return {"policy": f"the kernel did not have what was asked for until a moment ago: {self._last[1]}"}
        return {}

    def described(self) -> dict[str, object]:
        """For ``status``: how many disagreements were found, and the last."""
        when, what = self._last or (None, None)
        return {"disagreements": self.disagreements, "last": what, "when": when, "standing": list(self._standing)}


def _any(source: IPAddress) -> IPAddress:
    return IPv4Address(0) if source.version == 4 else IPv6Address(0)


def _anywhere() -> IPAddress:
    return IPv4Address(random.getrandbits(32)) if random.random() < 0.5 else IPv6Address(random.getrandbits(128))

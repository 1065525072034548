"""Verdicts as they happen, for those who watch: read from the gate's ring buffer, or told by the services.

The kernel makes events only while somebody watches, at most so many a second on each CPU; what goes beyond is counted.
A watcher who does not keep up loses the newest, and is told how many.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Final

from ..core.address import IPAddress, unmap
from ..kernel import abi, bpf
from ..kernel.gate_maps import GateMaps
from ..kernel.ringbuf import RingBuffer
from ..policy.counters import HOOKS
from ..policy.rule import Action, PolicyError, Stage, SynLimit, boottime_ns
from ..policy.store import PolicyStore
from .api import Json

__all__ = ["Event", "EventHub", "GateEvents", "rule_names"]

MAX_WATCHERS: Final = 16
BACKLOG: Final = 4096
_RATE: Final = SynLimit(1000, 256)  # on each CPU
_LOST_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Event:
    """One verdict that took effect. ``when`` is the wall clock in seconds, ``rule`` a name or what else decided."""

    when: float
    source: IPAddress
    port: int
    rule: str
    action: Action
    stage: Stage
    hook: str
    dry_rule: str = ""
    dry_action: Action = Action.NONE

    def json(self) -> Json:
        """As it is shown to programs."""
        shown: Json = {
            "time": datetime.fromtimestamp(self.when, tz=UTC).isoformat(timespec="milliseconds"),
            "source": str(self.source),
            "port": self.port,
            "rule": self.rule,
            "action": self.action.name.lower(),
            "stage": self.stage.name.lower(),
            "hook": self.hook,
        }
        if self.dry_rule:
            shown["dry_run"] = {"rule": self.dry_rule, "action": self.dry_action.name.lower()}
        return shown


class _Watcher:
    def __init__(self, rule: str | None) -> None:
        self.rule = rule
        self.waiting: deque[Event] = deque()
        self.lost = 0
        self.more = asyncio.Event()

    def offer(self, event: Event) -> None:
        if self.rule is not None and self.rule not in (event.rule, event.dry_rule):
            return
        if len(self.waiting) >= BACKLOG:
            self.lost += 1
        else:
            self.waiting.append(event)
        self.more.set()


class EventHub:
    """Passes events to watchers. ``watched`` is called with whether there are any, when that changes."""

    def __init__(self, watched: Callable[[bool], None] = lambda _: None) -> None:
        self._watched = watched
        self._watchers: set[_Watcher] = set()

    def publish(self, event: Event) -> None:
        """Offer an event to all watchers."""
        for watcher in self._watchers:
            watcher.offer(event)

    def lost(self, count: int) -> None:
        """Tell all watchers of events that were lost on the way."""
        for watcher in self._watchers:
            watcher.lost += count
            watcher.more.set()

    @property
    def is_watched(self) -> bool:
        """Whether anybody watches."""
        return bool(self._watchers)

    @contextlib.contextmanager
    def _joined(self, watcher: _Watcher) -> Iterator[None]:
        if len(self._watchers) >= MAX_WATCHERS:
            raise PolicyError(f"{MAX_WATCHERS} are watching already")
        self._watchers.add(watcher)
        if len(self._watchers) == 1:
            self._watched(True)
        try:
            yield
        finally:
            self._watchers.discard(watcher)
            if not self._watchers:
                self._watched(False)

    async def stream(self, params: Mapping[str, object]) -> AsyncGenerator[Json, None]:
        """The control method ``events``: ``{"event": …}`` and ``{"lost": n}`` as they come; ``rule`` picks one rule.

        Raises :class:`PolicyError` if too many watch already.
        """
        rule = params.get("rule")
        watcher = _Watcher(None if rule is None else str(rule))
        with self._joined(watcher):
            yield {"watching": True}
            while True:
                await watcher.more.wait()
                watcher.more.clear()
                while watcher.waiting:
                    yield {"event": watcher.waiting.popleft().json()}
                if watcher.lost:
                    lost, watcher.lost = watcher.lost, 0
                    yield {"lost": lost}


class GateEvents:
    """Reads the events of a gate into a hub while anybody watches. ``name`` returns the name of a rule by its id."""

    def __init__(self, maps: GateMaps, name: Callable[[int], str]) -> None:
        self.hub = EventHub(self._watched)
        self._maps = maps
        self._name = name
        self._ring: RingBuffer | None = None
        self._lost = 0
        self._timer: asyncio.TimerHandle | None = None
        # A server that was killed while somebody watched may have left it on.
        bpf.map_update(maps["event_rate"], bytes(4), bytes(abi.LIMIT.size))

    def _watched(self, watched: bool) -> None:
        loop = asyncio.get_running_loop()
        rate = abi.LIMIT.pack(_RATE.emission_ns, _RATE.tolerance_ns) if watched else bytes(abi.LIMIT.size)
        if watched:
            self._ring = RingBuffer(self._maps["events"])
            while self._ring.read(BACKLOG):
                pass  # of earlier watchers
            self._lost = self._lost_so_far()
            loop.add_reader(self._ring.fd, self._read)
            self._timer = loop.call_later(_LOST_SECONDS, self._count_lost)
        bpf.map_update(self._maps["event_rate"], bytes(4), rate)
        if not watched and self._ring is not None:
            loop.remove_reader(self._ring.fd)
            self._ring.close()
            self._ring = None
            if self._timer is not None:
                self._timer.cancel()

    def _read(self) -> None:
        assert self._ring is not None
        offset = time.time() - boottime_ns() / 1e9
        for record in self._ring.read(256):  # the loop has other things to do as well
            self.hub.publish(self._event(record, offset))

    def _event(self, record: bytes, offset: float) -> Event:
        at, packed, rule, dry_rule, port, hook, action, stage, dry_action, _ = abi.EVENT.unpack(record)
        return Event(
            at / 1e9 + offset,
            unmap(ip_address(packed)),
            port,
            self._name(rule) if rule else Stage(stage).name.lower(),
            Action(action),
            Stage(stage),
            HOOKS[hook],
            self._name(dry_rule) if dry_rule else "",
            Action(dry_action),
        )

    def _lost_so_far(self) -> int:
        raw = bpf.map_lookup(self._maps["event_meter"], bytes(4), abi.EVENT_METER.size * abi.possible_cpus())
        assert raw is not None
        return sum(lost for _, lost in abi.EVENT_METER.iter_unpack(raw))

    def _count_lost(self) -> None:
        lost = self._lost_so_far()
        if lost != self._lost:
            self.hub.lost(lost - self._lost)
            self._lost = lost
        self._timer = asyncio.get_running_loop().call_later(_LOST_SECONDS, self._count_lost)


def rule_names(store: PolicyStore) -> Callable[[int], str]:
    """Names of rules by their id, remembered until the policy changes."""
    known: dict[int, str] = {}
    revision = -1

    def name(rule_id: int) -> str:
        nonlocal revision
        if store.revision != revision:
            known.clear()
            revision = store.revision
        if rule_id not in known:
            known[rule_id] = store.rule_name(rule_id)
        return known[rule_id]

    return name

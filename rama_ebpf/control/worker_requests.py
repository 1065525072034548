"""What workers may ask the server, over their channels."""

from __future__ import annotations

import asyncio
import logging
import time
from ipaddress import ip_address
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ..core.address import IPAddress, unmap
from ..core.bucket import TokenBucket
from ..core.errors import RamaError
from ..layers.strikes import StrikeBook, StrikeLimit
from ..policy.local import CountedPolicy, LocalStore
from ..policy.rule import LONGEST_SECONDS, Action, IPNetwork, Stage
from ..policy.store import PolicyStore
from ..process import WorkerObserver, WorkerProcess
from ..process.plan import Json
from .events import Event, EventHub
from .policy_thread import PolicyThread

__all__ = ["WorkerRequests"]

log = logging.getLogger("rama_ebpf")

_BANS_A_SECOND: Final = 100.0
_BAN_BURST: Final = 500
_BANS_WAITING: Final = 128
"""Of one worker, which may have been taken over: what it may cost the policy."""
_MAX_REASON: Final = 119

_Address = Annotated[str, Meta(min_length=2, max_length=64)]
_Seconds = Annotated[float, Meta(gt=0, le=LONGEST_SECONDS)]


class _Verdict(msgspec.Struct, forbid_unknown_fields=True):
    source: _Address
    port: Annotated[int, Meta(ge=0, le=65535)]


class _Ban(msgspec.Struct, forbid_unknown_fields=True):
    source: _Address
    ttl: _Seconds
    reason: Annotated[str, Meta(max_length=1024)]


class _Strike(msgspec.Struct, forbid_unknown_fields=True):
    source: _Address
    reason: Annotated[str, Meta(max_length=1024)]
    strikes: Annotated[int, Meta(ge=1, le=10_000)]
    window: _Seconds
    ban: _Seconds
    spared: _Address | None = None


class TooManyBans(RamaError):
    """A worker asks for more than its share."""

    kind = "too_many_bans"


class WorkerRequests(WorkerObserver):
    """Answers workers. They parse bytes from the network: each request is bounded and checked."""

    def __init__(self, store: PolicyStore, thread: PolicyThread, events: EventHub) -> None:
        self._store = store
        self._judge = CountedPolicy(store) if isinstance(store, LocalStore) else store
        self._judges_here = isinstance(store, LocalStore)
        self._thread = thread
        self._events = events
        self._book = StrikeBook(lengths=store.source_lengths)

    def started(self, worker: WorkerProcess) -> None:
        share = _Share(self, worker.number)
        worker.channel.on("verdict", lambda body: self._verdict(worker, body), _Verdict)
        worker.channel.on("ban", lambda body: share.ban(body.source, body.ttl, body.reason), _Ban)
        worker.channel.on("strike", lambda body: self._strike(share, body), _Strike)

    def _verdict(self, worker: WorkerProcess, body: _Verdict) -> Json:
        if worker.superseded and self._judges_here:
            # It was accepted under a configuration whose policy is no more, and would be served by its services.
            return {"action": int(Action.DROP), "stage": int(Stage.DEFAULT), "rule": "superseded"}
        source = ip_address(body.source)
        answer = self._judge.verdict(source, body.port)
        if self._events.is_watched:
            details = (answer.rule, answer.action, answer.stage, "accept", answer.dry_rule, answer.dry_action)
            self._events.publish(Event(time.time(), source, body.port, *details))
        return {"action": int(answer.action), "stage": int(answer.stage), "rule": answer.rule}

    def _strike(self, share: _Share, body: _Strike) -> asyncio.Future[Json] | None:
        limit = StrikeLimit(body.strikes, body.window, body.ban)
        if not self._book.add(ip_address(body.source), limit, time.monotonic()):
            return None
        return share.ban(body.source, limit.ban, f"{limit.strikes} strikes, the last: {body.reason}", body.spared)

    def is_banned(self, banned: IPAddress | IPNetwork, ttl: float) -> bool:
        """Whether a ban for so long would change nothing: the rest of a burst."""
        return self._store.stands(banned, ttl)

    def target(self, source: str, spared: str | None) -> IPAddress | IPNetwork:
        """Return what a ban is of: the source, or one address of it where that must not shut ``spared`` out."""
        address = ip_address(source)
        prefix = self._store.source(address)
        return address if spared is not None and unmap(ip_address(spared)) in prefix else prefix

    def ban(self, banned: IPAddress | IPNetwork, ttl: float, reason: str) -> asyncio.Future[Json]:
        """Ban a source in the policy thread."""

        def work() -> Json:
            begun = time.time_ns()
            done = self._store.ban(banned, ttl=ttl, reason=reason[:_MAX_REASON], automatic=True)
            if done.created >= begun:  # not one that was there, and lasts as long
                log.warning("banned %s for %g s: %s", done.source, ttl, done.reason)
            return {}

        return self._thread.submit(work)


class _Share:
    """What one worker may ask for."""

    def __init__(self, requests: WorkerRequests, number: int) -> None:
        self._requests = requests
        self._number = number
        self._rate = TokenBucket(_BANS_A_SECOND, _BAN_BURST)
        self._waiting = 0
        self._said = 0.0

    def ban(self, source: str, ttl: float, reason: str, spared: str | None = None) -> asyncio.Future[Json] | None:
        """Ban a source; None if it is banned for as long already. Raises :class:`TooManyBans`."""
        banned = self._requests.target(source, spared)
        if self._requests.is_banned(banned, ttl):
            return None
        now = time.monotonic()
        if self._waiting >= _BANS_WAITING or self._rate.take(now):
            if now - self._said > 60:
                self._said = now
                log.error("worker %d asks for more bans than a worker may: some are refused", self._number)
            raise TooManyBans(f"more than {_BANS_A_SECOND:g} bans a second, or {_BANS_WAITING} at once")
        future = self._requests.ban(banned, ttl, reason)
        self._waiting += 1
        future.add_done_callback(lambda _: self._done())
        return future

    def _done(self) -> None:
        self._waiting -= 1

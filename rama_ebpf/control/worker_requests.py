"""What workers may ask the server, over their channels."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Final

from ..layers.strikes import StrikeBook, StrikeLimit
from ..policy.local import CountedPolicy, LocalStore
from ..policy.store import PolicyStore
from ..process.channel import Handler, RequestFailed
from ..process.plan import Json
from .events import Event, EventHub

__all__ = ["handlers"]

log = logging.getLogger("rama_ebpf")

_MAX_SECONDS: Final = 315_360_000.0
_MAX_REASON: Final = 119


Submit = Callable[[Callable[[], None]], Awaitable[None] | None]


def handlers(store: PolicyStore, events: EventHub, submit: Submit) -> dict[str, Handler]:
    """What workers may ask. They parse bytes from the network: each request is bounded and checked.

    ``submit`` has a change of the policy carried out, and returns its outcome.
    """
    judge = CountedPolicy(store) if isinstance(store, LocalStore) else store

    def verdict(body: Json) -> Json:
        source, port = ip_address(str(body["source"])), int(str(body["port"]))
        answer = judge.verdict(source, port)
        if events.is_watched:
            details = (answer.rule, answer.action, answer.stage, "accept", answer.dry_rule, answer.dry_action)
            events.publish(Event(time.time(), source, port, *details))
        return {"action": int(answer.action), "stage": int(answer.stage), "rule": answer.rule}

    async def ban(body: Json) -> Json:
        ttl, source, reason = _seconds(body["ttl"]), ip_address(str(body["source"])), str(body["reason"])

        def change() -> None:
            done = store.ban(source, ttl=ttl, reason=reason[:_MAX_REASON], automatic=True)
            if done.reason == reason[:_MAX_REASON]:
                log.warning("banned %s for %g s: %s", done.address, ttl, done.reason)

        outcome = submit(change)
        if outcome is None:
            raise RequestFailed("too many bans wait to be put into force")
        await outcome
        return {}

    book = StrikeBook()

    async def strike(body: Json) -> Json:
        limit = StrikeLimit(int(str(body["strikes"])), _seconds(body["window"]), _seconds(body["ban"]))
        if book.add(ip_address(str(body["source"])), limit, time.monotonic()):
            await ban({**body, "ttl": limit.ban, "reason": f"{limit.strikes} strikes, the last: {body['reason']}"})
        return {}

    return {"verdict": verdict, "ban": ban, "strike": strike}


def _seconds(value: object) -> float:
    """A duration that a worker names. Raises ValueError."""
    seconds = float(str(value))
    if not 0 < seconds <= _MAX_SECONDS:  # false for a NaN, too
        raise ValueError(f"{value!r}: use seconds, more than 0 and at most ten years")
    return seconds

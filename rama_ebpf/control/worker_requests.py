"""What workers may ask the server, over their channels."""

from __future__ import annotations

import logging
import time
from ipaddress import ip_address

from ..layers.strikes import StrikeBook, StrikeLimit
from ..policy.local import CountedPolicy, LocalStore
from ..policy.store import PolicyStore
from ..process.channel import Handler
from ..process.plan import Json
from .events import Event, EventHub

__all__ = ["handlers"]

log = logging.getLogger("rama_ebpf")


def handlers(store: PolicyStore, events: EventHub) -> dict[str, Handler]:
    """What workers may ask. They parse bytes from the network: each request is bounded and checked."""
    judge = CountedPolicy(store) if isinstance(store, LocalStore) else store

    def verdict(body: Json) -> Json:
        source, port = ip_address(str(body["source"])), int(str(body["port"]))
        answer = judge.verdict(source, port)
        if events.is_watched:
            details = (answer.rule, answer.action, answer.stage, "accept", answer.dry_rule, answer.dry_action)
            events.publish(Event(time.time(), source, port, *details))
        return {"action": int(answer.action), "stage": int(answer.stage), "rule": answer.rule}

    def ban(body: Json) -> Json:
        ttl = float(str(body["ttl"]))
        source = ip_address(str(body["source"]))
        done = store.ban(source, ttl=ttl, reason=str(body["reason"]))
        log.warning("banned %s for %g s: %s", done.address, ttl, done.reason)
        return {}

    book = StrikeBook()

    def strike(body: Json) -> Json:
        limit = StrikeLimit(int(str(body["strikes"])), float(str(body["window"])), float(str(body["ban"])))
        if book.add(ip_address(str(body["source"])), limit, time.monotonic()):
            ban({**body, "ttl": limit.ban, "reason": f"{limit.strikes} strikes, the last: {body['reason']}"})
        return {}

    return {"verdict": verdict, "ban": ban, "strike": strike}

"""What the server does for its policy by the clock, in threads: the event loop never waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from ..policy.refresh import Refresher
from ..policy.rule import PolicyError
from ..policy.store import PolicyStore

__all__ = ["refresh", "sweep", "sync"]

log = logging.getLogger("rama_ebpf")

_SWEEP_SECONDS: Final = 30.0
_SYNC_SECONDS: Final = 1.0
_REFRESH_SECONDS: Final = 10.0  # how often feeds are looked at, not read


async def sync(store: PolicyStore) -> None:
    """Bring the bans that services made to the disk, for which the event loop, where they are made, does not wait."""
    while True:
        await asyncio.sleep(_SYNC_SECONDS)
        await asyncio.to_thread(store.sync)


async def sweep(store: PolicyStore) -> None:
    """Forget what has expired and what nobody confirmed."""

    def once() -> None:
        freed = store.sweep()
        if freed:
            log.info("policy: %d expired rules and bans removed", freed)

    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        await _keep("the policy in order", once)


async def refresh(store: PolicyStore, refresher: Refresher) -> None:
    """Keep feeds fresh: all at the start, then each as it falls due. It may take as long as their servers do."""

    def once(*, all_feeds: bool = False) -> None:
        if store.pending is None:
            refresher.log_news(refresher.run(all_feeds=all_feeds))

    await _keep("feeds fresh", lambda: once(all_feeds=True))
    while True:
        await asyncio.sleep(_REFRESH_SECONDS)
        await _keep("feeds fresh", once)


async def _keep(what: str, work: Callable[[], None]) -> None:
    try:
        await asyncio.to_thread(work)
    except PolicyError as error:
        log.warning("cannot keep %s, trying again: %s", what, error)
    except OSError:
        log.exception("cannot keep %s, trying again", what)

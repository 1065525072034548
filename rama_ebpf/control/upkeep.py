"""What the server does for its policy by the clock, in threads: the event loop never waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..kernel.clock import ClockSteps
from ..policy.client_file import ClientFile
from ..policy.refresh import Refresher
from ..policy.rule import PolicyError
from ..policy.store import PolicyStore
from .policy_thread import PolicyThread

__all__ = ["keep_record", "refresh", "settle", "sweep", "sync", "watch_clock"]

log = logging.getLogger("rama_ebpf")

_SWEEP_SECONDS: Final = 30.0
_SYNC_SECONDS: Final = 1.0
_RECORD_SECONDS: Final = 300.0
_SETTLE_SECONDS: Final = 1.0
_REFRESH_SECONDS: Final = 10.0  # how often feeds are looked at, not read


async def sync(store: PolicyStore, thread: PolicyThread) -> None:
    """Bring the bans that services made to the disk, for which those who ask for them do not wait."""
    while True:
        await asyncio.sleep(_SYNC_SECONDS)
        await thread.run(store.sync)


async def sweep(store: PolicyStore, thread: PolicyThread) -> None:
    """Forget what has expired and what nobody confirmed."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        try:
            await thread.run(store.judge_when_sure)
            freed = await thread.run(store.sweep)
        except (PolicyError, OSError) as error:
            log.warning("cannot keep the policy in order, trying again: %s", error)
        else:
            if freed:
                log.info("policy: %d expired rules and bans removed", freed)
            await asyncio.to_thread(store.compact_bans)


async def keep_record(store: PolicyStore, path: Path, generation: int, keep: Callable[[], float | None]) -> None:
    """Bring the record of who came to the disk, every few minutes and at the end, where and for as long as the operator
    wants it. A disk that refuses is told once."""
    file, said = ClientFile(path), ""

    def write() -> None:
        nonlocal said
        if (seconds := keep()) is None:
            return
        try:
            file.write(generation, store.clients.all(), seconds)
            said = ""
        except OSError as error:
            if str(error) != said:
                log.error("the record of clients is not kept, trying again: %s", error)
            said = str(error)

    try:
        while True:
            await asyncio.sleep(_RECORD_SECONDS)
            await asyncio.to_thread(write)
    finally:
        await asyncio.to_thread(write)


async def settle(store: PolicyStore, thread: PolicyThread) -> None:
    """Note the end of trials that nobody confirmed, soon after it."""
    while True:
        await asyncio.sleep(_SETTLE_SECONDS)
        try:
            await thread.run(store.settle)
        except (PolicyError, OSError) as error:
            log.warning("the end of a trial is noted later: %s", error)


async def watch_clock(store: PolicyStore, thread: PolicyThread) -> None:
    """When the wall clock is set, judge again what was judged by it."""
    with ClockSteps() as steps:
        while True:
            changed = await thread.run(
                store.judge_again
            )  # also at first: it may have been set since the policy was read
            if changed:
                log.info("the wall clock was set: %d rules at run time and bans have another end by it", changed)
            await steps.wait()


async def refresh(store: PolicyStore, refresher: Refresher) -> None:
    """Keep feeds fresh: all at the start, then each as it falls due. It may take as long as their servers do."""

    def once(*, all_feeds: bool = False) -> None:
        if store.pending is None:
            refresher.log_news(refresher.run(all_feeds=all_feeds))

    all_feeds = True
    while True:
        try:
            await asyncio.to_thread(once, all_feeds=all_feeds)
        except PolicyError as error:
            log.warning("cannot keep feeds fresh, trying again: %s", error)
        except OSError as error:
            log.error("cannot keep feeds fresh, trying again: %s", error)
        all_feeds = False
        await asyncio.sleep(_REFRESH_SECONDS)

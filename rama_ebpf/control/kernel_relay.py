"""The relay in the kernel as the server process holds it: made at once, loaded and tried when a tunnel first wants it.

The maps are there before the workers, who get their descriptors. The program is compiled only when a worker says that
a tunnel would take it, because many servers have none that may: then the kernel is tried with the self-test, unless it
has passed since it was booted, and each worker that asked gets a share of its own, or the reason why there is none.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import platform
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from .. import __version__
from ..kernel.abi import source_dir
from ..kernel.btf import BtfUnavailable
from ..kernel.compile import CompileError
from ..kernel.splice import SpliceMaps
from ..policy.atomic import open_regular
from ..process import Nursery, WorkerObserver, WorkerProcess
from ..process.channel import Channel
from ..process.plan import Json
from ..relay.selftest import SelfTest, known_bad, self_test
from ..relay.sockmap import Sockmap

__all__ = ["KernelRelay", "RelayStatus", "passed_before", "try_kernel"]

log = logging.getLogger("rama_ebpf")

_SETTLE_SECONDS: Final = 2.0
"""Before the compiler takes a CPU for a second, and 120 MiB: not in the moment in which the first clients come."""
_MOST_BYTES: Final = 64 * 1024
_TUNNELS_PER_WORKER: Final = 8192
_MOST_TUNNELS: Final = 65_536
_GENERATIONS: Final = 2
"""Of workers that may be alive at once: those that serve, and those that drain after a reload."""


@dataclass(frozen=True, slots=True)
class RelayStatus:
    """What ``status`` says of the kernel's relay: ``state`` is ``unused`` (no tunnel wanted it yet), ``trying``,
    ``ready`` or ``refused``."""

    state: str
    why: str = ""


class KernelRelay(WorkerObserver):
    """``descriptors`` are for the workers. ``on_change`` is called when :attr:`status` has changed."""

    def __init__(
        self,
        workers: int,
        record: Path,
        nursery: Nursery,
        *,
        kernel_headers: Path | None,
        on_change: Callable[[], None],
    ) -> None:
        self._nursery = nursery
        self._record = record
        self._kernel_headers = kernel_headers
        self._on_change = on_change
        self._shares = _GENERATIONS * workers
        self._free = deque(range(self._shares))
        self._held: dict[str, int] = {}
        self._waiting: dict[str, Channel] = {}
        self._loading: asyncio.Task[None] | None = None
        self._maps = SpliceMaps({})
        self.status = RelayStatus("unused")
        try:
            self._maps = SpliceMaps.create(self._shares, min(_TUNNELS_PER_WORKER, _MOST_TUNNELS // self._shares))
        except OSError as error:
            self.status = RelayStatus("refused", f"no maps: {error.strerror}")

    @property
    def descriptors(self) -> dict[str, int]:
        """By names that begin with ``relay-``."""
        return {f"relay-{name}": fd for name, fd in self._maps.fds.items()}

    def close(self) -> None:
        """Give the maps up, after the event loop: nothing is under way then."""
        self._maps.close()

    def started(self, worker: WorkerProcess) -> None:
        worker.channel.on("sockmap", lambda body: self._wanted(worker.identity, worker.channel))

    def ended(self, worker: WorkerProcess) -> None:
        """Remove what a worker that is no more has left in the maps, and give its share to others."""
        self._waiting.pop(worker.identity, None)
        share = self._held.pop(worker.identity, None)
        if share is not None:
            Sockmap(self._maps.fds, share, self._shares)
            self._free.append(share)

    def _wanted(self, identity: str, channel: Channel) -> Json:
        self._waiting[identity] = channel
        if self.status.state in ("ready", "refused"):
            self._answer()
        elif self._loading is None:
            self._loading = self._nursery.start("the kernel's relay", self._load())
        return {}

    async def _load(self) -> None:
        await asyncio.sleep(_SETTLE_SECONDS)
        self._become(RelayStatus("trying"))
        try:
            result = await try_kernel(self._maps, self._record, kernel_headers=self._kernel_headers)
        except Exception as error:  # whatever is wrong with this part, the others serve on
            log.exception("the kernel's relay cannot be tried")
            result = SelfTest(f"{type(error).__name__}: {error}", 0.0)
        if result.refusal:
            log.warning("the kernel's relay is not used: %s", result.refusal)
            self._become(RelayStatus("refused", result.refusal))
        else:
            log.info("the kernel's relay is ready")
            self._become(RelayStatus("ready"))
        self._answer()

    def _become(self, status: RelayStatus) -> None:
        self.status = status
        self._on_change()

    def _answer(self) -> None:
        while self._waiting:
            identity, channel = self._waiting.popitem()
            if self.status.state == "refused":
                channel.notify("sockmap", {"refusal": self.status.why})
            elif identity in self._held:
                channel.notify("sockmap", {"share": self._held[identity], "shares": self._shares})
            elif not self._free:
                channel.notify("sockmap", {"refusal": "workers of earlier configurations hold all shares"})
            else:
                share = self._held[identity] = self._free.popleft()
                channel.notify("sockmap", {"share": share, "shares": self._shares})


async def try_kernel(maps: SpliceMaps, record: Path, *, kernel_headers: Path | None = None) -> SelfTest:
    """Attach the program to ``maps`` and try it on the running kernel, unless ``record`` says that it has passed.

    Nobody may use the maps meanwhile. A pass is written to ``record``; never raises for what the kernel does.
    """
    refusal = known_bad(platform.release())
    if refusal:
        return SelfTest(refusal, 0.0)
    try:
        await asyncio.to_thread(maps.attach, kernel_headers=kernel_headers)
    except (OSError, CompileError, BtfUnavailable) as error:
        return SelfTest(str(error).splitlines()[0], 0.0)
    passed = passed_before(record)
    if passed is not None:
        return passed
    result = await self_test(maps.fds)
    if not result.refusal:
        temporary = record.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"subject": _subject(), **asdict(result)}), encoding="utf-8")
        temporary.replace(record)
    return result


def passed_before(record: Path) -> SelfTest | None:
    """Return how this program has passed on this kernel since it was booted, None if it has not been tried."""
    try:
        with open(open_regular(record, os.O_RDONLY), "rb") as file:
            row = json.loads(file.read(_MOST_BYTES))
        return SelfTest("", float(row["seconds"])) if row["subject"] == _subject() else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # never tried, torn, or none of ours: then it is tried again


def _subject() -> dict[str, str]:
    """What a self-test is about: this boot of this kernel, and this program."""
    digest = hashlib.sha256()
    for name in ("splice.c", "splice.h"):
        digest.update((source_dir() / name).read_bytes())
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        "kernel": f"{platform.release()} {platform.version()}",
        "program": digest.hexdigest(),
        "version": __version__,
    }

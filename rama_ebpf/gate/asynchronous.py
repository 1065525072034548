"""The gate for programs on asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address
from os import PathLike
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ..policy.store import PolicyStore
from .answers import BanEntry, Change, Counters, Decision, Difference, Loaded, RuleEntry
from .arguments import Sources, Ttl
from .errors import told
from .events import Events
from .sync import SyncGate

if TYPE_CHECKING:
    from .guard import Guard, GuardedListener

__all__ = ["Gate"]

P = ParamSpec("P")
T = TypeVar("T")


class Gate:
    """The kernel's gate of one instance: who may connect, before accept(2)::

        async with Gate("default") as gate:
            await gate.block("198.51.100.0/24", ttl=3600, reason="scans")
            async for event in gate.events():
                ...

    It is :class:`~.sync.SyncGate` with a thread of its own: calls come one after the other, and none holds up the loop.
    What is said there of each holds here.
    """

    def __init__(self, instance: str | None = None, *, store: PolicyStore | None = None) -> None:
        self._gate = SyncGate(instance, store=store)
        self.instance = self._gate.instance
        self._thread = ThreadPoolExecutor(1, "rama-ebpf-gate")

    async def __aenter__(self) -> Gate:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let go of it. What was put into force stays."""
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        work = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def block(
        self,
        source: Sources,
        *,
        ttl: Ttl = None,
        port: int | None = None,
        reject: bool = False,
        dry_run: bool = False,
        reason: str = "",
    ) -> Change:
        """Turn a source, or many, away from now on: see :meth:`.SyncGate.block`."""
        block = self._gate.block
        return await self._run(block, source, ttl=ttl, port=port, reject=reject, dry_run=dry_run, reason=reason)

    async def allow(self, source: Sources, *, ttl: Ttl = None, port: int | None = None, reason: str = "") -> Change:
        """Let a source, or many, in, also as an exception inside a wider block."""
        return await self._run(self._gate.allow, source, ttl=ttl, port=port, reason=reason)

    async def unblock(self, source: Sources, *, port: int | None = None) -> Change:
        """Take back blocks, allows and bans: see :meth:`.SyncGate.unblock`."""
        return await self._run(self._gate.unblock, source, port=port)

    async def ban(self, source: Sources, *, ttl: Ttl = None, reject: bool = False, reason: str = "") -> Change:
        """Shut a source, or many, out before all rules: see :meth:`.SyncGate.ban`."""
        return await self._run(self._gate.ban, source, ttl=ttl, reject=reject, reason=reason)

    async def verdicts(self, source: str | IPv4Address | IPv6Address, *, port: int | None = None) -> list[Decision]:
        """Say what is decided for an address, for each listener: see :meth:`.SyncGate.verdicts`."""
        return await self._run(self._gate.verdicts, source, port=port)

    async def verdict(self, source: str | IPv4Address | IPv6Address, *, port: int | None = None) -> Decision:
        """The first of :meth:`verdicts` that does not let it in; if all do, the first."""
        return await self._run(self._gate.verdict, source, port=port)

    async def rules(self) -> list[RuleEntry]:
        """Return the rules in force, with their counters."""
        return await self._run(self._gate.rules)

    async def bans(self) -> list[BanEntry]:
        """Return the bans in force."""
        return await self._run(self._gate.bans)

    async def failsafe(self) -> list[str]:
        """Return the networks that nothing can shut out."""
        return await self._run(self._gate.failsafe)

    async def counters(self) -> Counters:
        """Return what the gate in the kernel has counted."""
        return await self._run(self._gate.counters)

    def events(self, rule: str | None = None) -> Events:
        """Watch verdicts as they take effect, or those of one rule. Needs a running server."""
        with told():
            return Events(self.instance, rule)

    async def load(
        self,
        path: str | PathLike[str],
        *,
        confirm_within: float | None = None,
        revision: int | None = None,
        yes: bool = False,
    ) -> Loaded:
        """Put the set of a policy file into force at once: see :meth:`.SyncGate.load`."""
        return await self._run(self._gate.load, path, confirm_within=confirm_within, revision=revision, yes=yes)

    async def diff(self, path: str | PathLike[str]) -> Difference:
        """Say what loading a policy file would change."""
        return await self._run(self._gate.diff, path)

    async def export(self) -> str:
        """Return the set in force as the text of a policy file."""
        return await self._run(self._gate.export)

    async def confirm(self) -> int:
        """Keep the set that is on trial; return the revision."""
        return await self._run(self._gate.confirm)

    async def rollback(self) -> int:
        """Undo the set that is on trial; return the revision."""
        return await self._run(self._gate.rollback)

    @contextlib.asynccontextmanager
    async def trial(self, path: str | PathLike[str], *, within: float = 60.0) -> AsyncIterator[Loaded]:
        """Load a set on trial: it is confirmed when the block ends well, and undone when it raises, or when ``within``
        seconds are over, whatever becomes of this process."""
        loaded = await self.load(path, confirm_within=within)
        try:
            yield loaded
        except BaseException:
            await self.rollback()
            raise
        await self.confirm()

    def guard(self, *listeners: GuardedListener, failsafe: Sequence[str] = ()) -> _Guarding:
        """Put listeners of other programs, or of this one, under the policy: see :meth:`.SyncGate.guard`. Await it,
        or use it as a context manager."""
        return _Guarding(lambda: self._run(self._gate.guard, *listeners, failsafe=failsafe))


class _Guarding:
    """A guard that is being made: ``await`` it, or enter it."""

    def __init__(self, make: Callable[[], Awaitable[Guard]]) -> None:
        self._make = make
        self._guard: Guard | None = None

    def __await__(self) -> Generator[object, None, Guard]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Guard:
        self._guard = await self._make()
        return self._guard

    async def __aexit__(self, *_exc: object) -> None:
        if self._guard is not None:
            await self._guard.aclose()

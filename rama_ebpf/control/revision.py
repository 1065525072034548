"""One revision of the configuration: its listeners, its policy and its services come into force together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from ..policy.compiler import CompiledSet
from ..policy.failsafe import check_failsafe
from ..policy.feed_store import FeedStore
from ..policy.refresh import FeedReport, with_feeds
from ..policy.rule import PolicyError, RuleSet, Settings
from ..policy.store import PolicyStore
from ..process import Plan
from .divert import Diverter
from .egress import Egress
from .listeners import Listeners
from .options import DaemonOptions
from .policy_host import PolicyHost
from .policy_thread import PolicyThread
from .predecessor import Predecessor
from .sockets import SocketSet

__all__ = ["Deployment", "Policy", "ServedRevision"]

log = logging.getLogger("rama_ebpf")


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where revisions come into force. ``probe`` finds out which listeners are guarded; ``in_force`` is told of each
    revision that is; ``before_leave`` waits until listeners may be closed at the end."""

    host: PolicyHost
    listeners: Listeners
    egress: Egress
    feeds: FeedStore
    thread: PolicyThread
    probe: Callable[[], Awaitable[None]]
    in_force: Callable[[DaemonOptions], None]
    before_leave: Callable[[], Awaitable[None]]
    diverter: Diverter

    def put_settings(self, options: DaemonOptions) -> None:
        """Have egress policy and the rate of rejects be those of ``options``, on the event loop. Raises PolicyError or
        OSError."""
        self.egress.put(options.egress, options.name_servers)
        if self.host.gate is not None:
            limit = options.rejects
            self.host.gate.limit_rejects(None if limit is None else (limit.emission_ns, limit.tolerance_ns))


class ServedRevision:
    """What the supervisor of ``rama-ebpf run`` runs (see :class:`~rama_ebpf.process.Revision`)."""

    def __init__(
        self,
        options: DaemonOptions,
        plan: Plan,
        sockets: SocketSet,
        deployment: Deployment,
        before: DaemonOptions | None,
        policy: Policy | None,
        predecessor: Predecessor | None = None,
    ) -> None:
        """``before`` are the options in force, None at the start, and so is ``policy``: then it is made when it is
        put into force, which is not before all else is known to be good. ``predecessor`` is another server that serves
        until then, with the same sockets."""
        self.options = options
        self.plan = plan
        self._sockets = sockets
        self._to = deployment
        self._before = before
        self._policy = policy
        self._predecessor = predecessor

    async def enter(self) -> None:
        """Close the gate, change policy and egress, steer to the new sockets, open. While it is closed SYNs get no
        answer, so their clients try again; what had got in before stays with the services that it got in to. The lock
        of the policy comes first: whoever holds it delays the reload, and no client. What is not guarded is not
        opened."""
        loop = asyncio.get_running_loop()

        def on_loop(step: Callable[[], None]) -> None:
            asyncio.run_coroutine_threadsafe(_step(step), loop).result()

        if self._predecessor is not None and self._to.host.gate is not None:
            self._predecessor.at("programs into their links")
            await asyncio.to_thread(self._to.host.gate.attachments.update)
        await self._to.probe()
        await self._to.thread.run(lambda: self._enter(on_loop))
        self._to.in_force(self.options)

    def _enter(self, on_loop: Callable[[Callable[[], None]], None]) -> None:
        """In the policy thread; ``on_loop`` has a step done on the event loop, whose the listeners are."""
        to, options, before = self._to, self.options, self._before
        with to.host.store.held():
            began = time.monotonic()
            with contextlib.ExitStack() as undo:
                undo.callback(self._open, on_loop)
                on_loop(to.listeners.close_gate)
                if self._predecessor is not None:
                    self._predecessor.step = "switch"
                    self._predecessor.pause()
                if before is not None:
                    undo.callback(self._put_settings, before, on_loop)
                self._put_settings(options, on_loop)
                undo.callback(self._put_policy())
                undo.callback(to.diverter.put, to.diverter.bindings)
                to.diverter.put(self._sockets.diverted)
                on_loop(lambda: to.listeners.switch(self._sockets))
                undo.pop_all()  # clients meet this revision now: whatever fails from here on, it is the one in force
            self._open(on_loop)
        if before is not None:
            log.info("new clients waited for %.0f ms", 1000 * (time.monotonic() - began))

    def _open(self, on_loop: Callable[[Callable[[], None]], None]) -> None:
        """Open the listeners of the revision in force. A listener that the kernel does not open stays closed, until the
        next probe of the gate opens it."""
        try:
            on_loop(self._to.listeners.reopen_gate)
        except OSError as error:
            log.error("some listeners stay closed for now: %s", error)

    def _put_settings(self, options: DaemonOptions, on_loop: Callable[[Callable[[], None]], None]) -> None:
        on_loop(lambda: self._to.put_settings(options))

    def _put_policy(self) -> Callable[[], None]:
        store = self._to.host.store
        if self._before is None:
            restored = store.restore_bans()
            if restored:
                log.info("restored %d ban%s from the previous run", restored, "" if restored == 1 else "s")
        policy = self._policy
        if policy is None or policy.known != store.set_token():  # another set was loaded since it was prepared
            policy = Policy.of(self.options, store, self._to.feeds)
        return policy.put(store)

    async def abandon(self) -> None:
        self._to.listeners.give_up(self._sockets)

    async def superseded(self) -> None:
        self._to.listeners.give_up(self._sockets)

    def stop(self) -> None:
        self._to.listeners.stop()

    async def leave(self) -> None:
        await self._to.before_leave()
        self._to.listeners.close()


async def _step(step: Callable[[], None]) -> None:
    step()


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration says of the policy, checked and compiled, so that it is put into force quickly."""

    options: DaemonOptions
    ruleset: RuleSet | None
    compiled: CompiledSet | None
    reports: tuple[FeedReport, ...]
    known: int = 0
    """The set in force from which sources of feeds were taken."""

    @classmethod
    def of(cls, options: DaemonOptions, store: PolicyStore, feeds: FeedStore) -> Policy:
        """Find out what cannot be carried out, while everything is as it was. Raises PolicyError or OSError."""
        check_failsafe(options.failsafe or ())
        if options.rules is None:
            return cls(options, None, None, (), store.set_token())
        known = store.set_token()
        ruleset, reports = with_feeds(RuleSet(options.rules), feeds, known=store.ruleset())
        return cls(options, ruleset, store.compile(ruleset), tuple(reports), known)

    def settings(self, present: Settings) -> Settings:
        """Return the settings, given those in force. SYN limits go with the rules."""
        options = self.options
        settings = present if options.default is None else replace(present, default=options.default)
        if options.rules is None:
            return settings
        return replace(settings, per_source=options.per_source, overall=options.overall)

    def put(self, store: PolicyStore) -> Callable[[], None]:
        """Put it into force as far as it says anything; return what undoes that. A set on trial is undone.

        Raises PolicyError or OSError; then the policy is as it was. It waits for locks and disks.
        """
        options = self.options
        if store.pending is not None and (options.rules is not None or options.default is not None):
            log.warning("the set on trial is undone: the configuration says what is to be in force")
            store.roll_back()
        failsafe, before, settings = store.failsafe(), store.ruleset(), store.settings()
        lengths = store.source_lengths()

        def undo() -> None:
            store.set_source_lengths(lengths)
            if options.failsafe is not None:
                store.set_failsafe(failsafe)
            if self.ruleset is not None:
                store.replace(before, origin="the configuration before", must_be_kept=False)
            elif store.settings() != settings:
                store.set_settings(settings)

        try:
            store.set_source_lengths(options.source_lengths)
            if options.failsafe is not None:
                store.set_failsafe(list(options.failsafe))  # first: what follows may shut everybody else out
            if self.ruleset is not None:
                store.replace(
                    self.ruleset,
                    compiled=self.compiled,
                    origin="configuration",
                    settings=self.settings,
                    must_be_kept=False,
                )
            elif self.settings(settings) != settings:
                store.set_settings(self.settings(settings))
        except (PolicyError, OSError):
            undo()
            raise
        for report in self.reports:
            report.log()
        return undo

"""The gate for programs without an event loop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from os import PathLike
from typing import TYPE_CHECKING, cast

from ..control.api import ControlApi, Json
from ..control.reach import call
from ..kernel.instance import Instance
from ..policy.feed_store import FeedStore
from ..policy.store import PolicyStore
from . import answers
from .answers import BanEntry, Change, Counters, Decision, Difference, Loaded, RuleEntry
from .arguments import Sources, Ttl, path_text, port_number, reason_text, source_texts, ttl_text
from .errors import told
from .events import SyncEvents

if TYPE_CHECKING:
    from .guard import Guard, GuardedListener

__all__ = ["SyncGate"]

_Way = Callable[[str, Mapping[str, object]], Json]


class SyncGate:
    """The kernel's gate of one instance: who may connect, before accept(2). A context manager.

    Where the policy is, it is found: in pinned maps (as root, whether a server runs or not), or else in the server
    behind the control socket. With ``store`` it is that one, in this process.

    All methods raise :class:`~.errors.GateUnavailable` if the instance is not loaded or its server is gone,
    :class:`~.errors.GateRefused` for what cannot be (nothing is changed), :class:`~.errors.GateFailed` where kernel or
    disk refuse, and TypeError or ValueError for wrong arguments. They wait for the policy's lock and for the disk, so
    they are not for an event loop: see :class:`~.asynchronous.Gate`.
    """

    def __init__(self, instance: str | None = None, *, store: PolicyStore | None = None) -> None:
        """``instance`` is by default what ``$RAMA_EBPF_INSTANCE`` says, or ``default``, as for the commands."""
        instance = os.environ.get("RAMA_EBPF_INSTANCE", "default") if instance is None else instance
        if not isinstance(instance, str):
            raise TypeError(f"an instance is named by text, not by {type(instance).__name__}: write Gate('default')")
        if store is not None and not isinstance(store, PolicyStore):
            raise TypeError(f"store is a KernelStore or a LocalStore, not {type(store).__name__}")
        self.instance = Instance(instance)
        self._way: _Way
        if store is None:
            self._way = lambda method, params: call(self.instance, method, params)
        else:
            self._way = ControlApi(store, FeedStore(self.instance.feeds_dir)).call

    def __enter__(self) -> SyncGate:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it. What was put into force stays."""

    def _call(self, method: str, **params: object) -> Json:
        with told():
            return self._way(method, params)

    # -- sources -------------------------------------------------------------------------------------------------

    def block(
        self,
        source: Sources,
        *,
        ttl: Ttl = None,
        port: int | None = None,
        reject: bool = False,
        dry_run: bool = False,
        reason: str = "",
    ) -> Change:
        """Turn a source, or many, away from now on, for ``ttl`` or for good, on all listeners or on ``port``: by
        silence, with ``reject`` by RST. A ``dry_run``, of one source, only counts."""
        texts, one = source_texts(source)
        action = "reject" if reject else "drop"
        if dry_run and not one:
            raise ValueError("a dry run is of one source: load a set with dry_run rules for many")
        return self._add(texts, action, ttl, port, reason, one=one, dry_run=dry_run)

    def allow(self, source: Sources, *, ttl: Ttl = None, port: int | None = None, reason: str = "") -> Change:
        """Let a source, or many, in, also as an exception inside a wider block."""
        texts, one = source_texts(source)
        return self._add(texts, "allow", ttl, port, reason, one=one)

    def _add(
        self,
        texts: Sequence[str],
        action: str,
        ttl: Ttl,
        port: int | None,
        reason: str,
        *,
        one: bool,
        dry_run: bool = False,
    ) -> Change:
        with told():
            shared = {"action": action, "ttl": ttl_text(ttl), "port": port_number(port), "reason": reason_text(reason)}
        if one:
            return answers.change_of(self._call("add", source=texts[0], dry_run=dry_run, **shared), 1)
        return answers.change_of(self._call("add_many", sources=list(texts), **shared), len(set(texts)))

    def unblock(self, source: Sources, *, port: int | None = None) -> Change:
        """Take back blocks, allows and bans of exactly this source, or of these. ``sources`` of the answer is how many
        there were."""
        texts, one = source_texts(source)
        if not one:
            result = self._call("remove_many", sources=texts, port=port_number(port))
            return answers.change_of(result, cast("int", result["count"]))
        result = self._call("remove", source=texts[0], port=port_number(port))
        change = answers.change_of(result, len(cast("list[str]", result["removed"])) + bool(result["ban_lifted"]))
        wider = result["still_banned"]
        if wider is None:
            return change
        return Change(change.sources, change.revision, change.enforced, f"the ban of {wider} covers it")

    def ban(self, source: Sources, *, ttl: Ttl = None, reject: bool = False, reason: str = "") -> Change:
        """Shut a source, or many, out before all rules; kept over restarts. A source is an address, or the prefix by
        which strikes are counted: for IPv6 a /64, unless configured."""
        texts, one = source_texts(source)
        with told():
            shared = {"ttl": ttl_text(ttl), "reason": reason_text(reason), "action": "reject" if reject else "drop"}
        if one:
            return answers.change_of(self._call("ban", address=texts[0], **shared), 1)
        return answers.change_of(self._call("ban_many", sources=texts, **shared), len(set(texts)))

    # -- asking --------------------------------------------------------------------------------------------------

    def verdicts(self, source: str | IPv4Address | IPv6Address, *, port: int | None = None) -> list[Decision]:
        """Say what is decided for a connection from an address, to each listener, or to those of ``port``: by the
        kernel's own word where a server runs."""
        (text, *_), one = source_texts(source)
        if not one:
            raise TypeError("a verdict is of one address")
        result = self._call("test", source=text, port=port_number(port))
        return [answers.decision_of(row, result["source"]) for row in cast("list[Json]", result["decisions"])]

    def verdict(self, source: str | IPv4Address | IPv6Address, *, port: int | None = None) -> Decision:
        """The first of :meth:`verdicts` that does not let it in; if all do, the first."""
        found = self.verdicts(source, port=port)
        return next((decision for decision in found if not decision.allowed), found[0])

    def rules(self) -> list[RuleEntry]:
        """Return the rules in force, with their counters."""
        return [answers.rule_of(row) for row in cast("list[Json]", self._call("list")["rules"])]

    def bans(self) -> list[BanEntry]:
        """Return the bans in force."""
        return [answers.ban_of(row) for row in cast("list[Json]", self._call("bans")["bans"])]

    def failsafe(self) -> list[str]:
        """Return the networks that nothing can shut out."""
        return cast("list[str]", self._call("list")["failsafe"])

    def counters(self) -> Counters:
        """Return what the gate in the kernel has counted."""
        result = self._call("counters")
        rows = cast("list[Json]", result["verdicts"])
        verdicts = {
            (str(row["hook"]), str(row["stage"]), str(row["action"])): cast("int", row["count"]) for row in rows
        }
        return Counters(verdicts, cast("int", result["silent_rejects"]))

    def events(self, rule: str | None = None) -> SyncEvents:
        """Watch verdicts as they take effect, or those of one rule. Needs a running server. Close what is returned, or
        use it as a context manager."""
        with told():
            return SyncEvents(self.instance, rule)

    # -- the set -------------------------------------------------------------------------------------------------

    def load(
        self,
        path: str | PathLike[str],
        *,
        confirm_within: float | None = None,
        revision: int | None = None,
        yes: bool = False,
    ) -> Loaded:
        """Put the set of a policy file into force at once; if ``revision`` is given, only if it is the one in force.
        With ``confirm_within`` (seconds) the kernel undoes it unless :meth:`confirm` comes in time. A set that would
        cut many clients of late is refused, or goes on trial, unless that is given or ``yes``."""
        params = {"confirm_within": confirm_within, "revision": revision, "yes": yes}
        result = self._call("load", path=path_text(path), **params)
        return Loaded(
            cast("int", result["revision"]),
            cast("int", result["rules"]),
            cast("int", result["prefixes"]),
            cast("float | None", result["confirm_within"]),
        )

    def diff(self, path: str | PathLike[str]) -> Difference:
        """Say what loading a policy file would change."""
        return answers.difference_of(self._call("diff", path=path_text(path)))

    def export(self) -> str:
        """Return the set in force as the text of a policy file."""
        return str(self._call("export")["toml"])

    def confirm(self) -> int:
        """Keep the set that is on trial; return the revision."""
        return cast("int", self._call("confirm")["revision"])

    def rollback(self) -> int:
        """Undo the set that is on trial; return the revision."""
        return cast("int", self._call("rollback")["revision"])

    @contextlib.contextmanager
    def trial(self, path: str | PathLike[str], *, within: float = 60.0) -> Iterator[Loaded]:
        """Load a set on trial: it is confirmed when the block ends well, and undone when it raises, or when ``within``
        seconds are over, whatever becomes of this process."""
        loaded = self.load(path, confirm_within=within)
        try:
            yield loaded
        except BaseException:
            self.rollback()
            raise
        self.confirm()

    # -- listeners of other programs -----------------------------------------------------------------------------

    def guard(self, *listeners: GuardedListener, failsafe: Sequence[str] = ()) -> Guard:
        """Put listeners of other programs, or of this one, under the policy: before accept(2), without a proxy.

        Each is a listening socket, a port, or an (address, port) of this network namespace; nothing has to listen there
        yet. It lasts until :meth:`.guard.Guard.close`, and no longer than this process. ``failsafe`` networks are kept
        open whatever the policy says; where a server runs, its own are, and none can be named here. Needs root. Raises
        :class:`~.errors.GuardRefused` where the caller's own session would not be covered by the failsafe, or where a
        listener is guarded already.
        """
        from .guard import Guard  # brings in what only a guard needs

        with told():
            return Guard(self.instance, listeners, failsafe=failsafe)

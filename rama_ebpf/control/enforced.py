"""Said = enforced: before anybody says that a change is in force, who decides is asked, and what it answers is told.

In the kernel that is the witness (:mod:`rama_ebpf.kernel.witness`); where the policy is in the server's process, the
policy that it judges by. What is asked is a connection from a source of the change to each listener that it is about.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Protocol, TypeVar

from ..core.address import IPAddress, SocketAddress
from ..core.errors import RamaError
from ..kernel.witness import Answer, Question, Witness
from ..policy.compiler import MAPPED
from ..policy.kernel_store import KernelStore
from ..policy.rule import Action, IPNetwork, Rule, Stage, Verdict, boottime_ns
from ..policy.store import PolicyStore
from ..policy.stored import StoredRule

__all__ = [
    "Decision",
    "InForce",
    "Judge",
    "KernelJudge",
    "StoreJudge",
    "any_of",
    "carry_out",
    "enforcement",
    "sample",
    "targets",
    "told",
    "unheard",
]

Json = dict[str, object]
T = TypeVar("T")

_EXAMPLES: Final = 10
_MOST_TARGETS: Final = 64
_ASSUMED_PORT: Final = 1080
_WORDS: Final = {Stage.FAILSAFE: "the failsafe", Stage.BAN: "a ban"}
SAMPLE_OF_SET: Final = 64
"""Rules of a set that are asked about when it has come into force."""


class InForce(RamaError):
    """A change is in force, though what was to follow it failed."""

    kind = "in_force"


def carry_out(change: Callable[[], T], is_in_force: Callable[[], bool]) -> T:
    """Make a change. Where it fails, look whether it is in force all the same: then :class:`InForce` is raised, else
    what ``change`` raised."""
    try:
        return change()
    except OSError as error:
        try:
            done = is_in_force()
        except OSError as again:
            raise OSError(error.errno, f"{error}; whether it is in force is not known: {again}") from error
        if done:
            raise InForce(f"in force, but what follows a change failed: {error}") from error
        raise


@dataclass(frozen=True, slots=True)
class Decision:
    """What is decided for a connection from ``source`` to ``target``. ``rule`` is the rule that decided, if one did;
    ``guarded`` is False where the target is no listener that is open under the gate."""

    source: IPAddress
    target: SocketAddress
    verdict: Verdict
    rule: StoredRule | None = None
    guarded: bool = True

    @property
    def is_limited(self) -> bool:
        """Whether it lets in no more than a rule's rate."""
        return self.rule is not None and self.rule.action is Action.LIMIT

    @property
    def by(self) -> str:
        """Who decided, in words."""
        verdict, rule = self.verdict, self.rule
        if verdict.stage in _WORDS:
            return _WORDS[verdict.stage]
        if verdict.stage is Stage.DEFAULT:
            return f"the default ({verdict.action.name.lower()})"
        port = "" if rule is None or rule.port is None else f" --port {rule.port}"
        action, colon, source = verdict.rule.partition(":")
        if colon and action.upper() in Action.__members__:  # of `block` or `allow`
            return f'"{action} {source}{port}"'
        limit = " (limit)" if self.is_limited else ""
        return f"rule {verdict.rule}{port.replace(' --', ', ')}{limit}"

    def json(self) -> Json:
        """As it is shown to programs."""
        verdict = self.verdict
        row: Json = {
            "source": str(self.source),
            "listener": told(self.target),
            "action": verdict.action.name.lower(),
            "stage": verdict.stage.name.lower(),
            "rule": verdict.rule,
            "by": self.by,
            "limited": self.is_limited,
        }
        if verdict.dry_rule:
            row["dry_run"] = {"rule": verdict.dry_rule, "action": verdict.dry_action.name.lower()}
        return row


class Judge(Protocol):
    """Who decides, asked. All methods may raise OSError."""

    @property
    def serving(self) -> bool:
        """Whether there is a server whose word this is."""

    def listeners(self, port: int | None = None) -> Sequence[SocketAddress]:
        """The addresses that are under the gate of a running server, or those with a ``port``; of what is bound to
        prefixes and ranges of ports an example each."""

    def decide(self, asked: Iterable[tuple[IPAddress, SocketAddress]]) -> list[Decision]:
        """Say what is decided for each (source, listener)."""

    def unguarded(self) -> Mapping[SocketAddress, str]:
        """The listeners that are open though the gate does not guard them, and why."""

    def unheard(self, rules: Sequence[Rule]) -> list[str]:
        """Which of these rules of the loaded set are not found for a source of theirs, in words."""


class KernelJudge:
    """Asks the witness, which ``opened`` yields when there is something to ask. ``described`` returns what the server
    says of its listeners, as ``status`` has it."""

    serving = True

    def __init__(
        self,
        store: KernelStore,
        opened: Callable[[], contextlib.AbstractContextManager[Witness]],
        described: Callable[[], object] = list,
    ) -> None:
        self._store = store
        self._opened = opened
        self._described = described

    def unguarded(self) -> Mapping[SocketAddress, str]:
        return _unguarded(self._described())

    def listeners(self, port: int | None = None) -> Sequence[SocketAddress]:
        return self._store.counters.guarded(port)

    def decide(self, asked: Iterable[tuple[IPAddress, SocketAddress]]) -> list[Decision]:
        pairs, known = list(asked), dict[int, StoredRule | None]()
        with self._opened() as witness:
            answers = witness.ask(Question(source, target) for source, target in pairs)

        def rule(number: int) -> StoredRule | None:
            if number not in known:
                known[number] = self._store.stored_rule(number) if number else None
            return known[number]

        return [
            Decision(source, target, _verdict(answer, rule), rule(answer.rule), bool(answer.open))
            for (source, target), answer in zip(pairs, answers, strict=True)
        ]

    def unheard(self, rules: Sequence[Rule]) -> list[str]:
        now = boottime_ns()
        asked = [
            (rule, network)
            for rule in rules
            if not rule.dry_run and (rule.expires is None or now < rule.expires)
            for network in itertools.islice(rule.sources, 1)
        ]
        with self._opened() as witness:
            answers = witness.ask(
                Question(network.network_address, SocketAddress(any_of(network.version), rule.port or _ASSUMED_PORT))
                for rule, network in asked
            )
        return [
            f"rule {rule.name} is not found for {network}"
            for (rule, network), answer in zip(asked, answers, strict=True)
            if answer.stage not in _WORDS and answer.loaded[0] < _rank(rule, network)
        ]


class StoreJudge:
    """Asks the policy itself: where it is in the server's process, that is what judges; where no server runs, it is
    what the next one will use. ``listeners`` returns the addresses as they are now."""

    def __init__(
        self, store: PolicyStore, listeners: Callable[[], Iterable[SocketAddress]] = tuple, *, serving: bool
    ) -> None:
        self._store = store
        self._listeners = listeners
        self._serving = serving

    @property
    def serving(self) -> bool:
        return self._serving

    def listeners(self, port: int | None = None) -> Sequence[SocketAddress]:
        return [at for at in self._listeners() if port in (None, at.port)]

    def unguarded(self) -> Mapping[SocketAddress, str]:
        return {}  # it judges by itself

    def decide(self, asked: Iterable[tuple[IPAddress, SocketAddress]]) -> list[Decision]:
        present = set(self.listeners())
        return [
            Decision(source, target, self._store.verdict(source, target.port), None, target in present)
            for source, target in asked
        ]

    def unheard(self, rules: Sequence[Rule]) -> list[str]:
        return []  # there is one copy of them


def _unguarded(rows: object) -> Mapping[SocketAddress, str]:
    found = {}
    for row in rows if isinstance(rows, list) else ():
        if row.get("guarded", True) or not row.get("open"):
            continue
        host, _, port = str(row["address"]).rpartition(":")
        found[SocketAddress(ip_address(host.strip("[]")), int(port))] = str(row["guard"])
    return found


def _verdict(answer: Answer, rule: Callable[[int], StoredRule | None]) -> Verdict:
    def name(number: int) -> str:
        found = rule(number)
        return "" if not number else f"#{number}" if found is None else found.name

    stage = Stage(answer.stage)
    fixed = {Stage.BAN: "ban", Stage.DEFAULT: "default"}.get(stage, "")
    return Verdict(
        Action(answer.action), stage, name(answer.rule) or fixed, name(answer.dry_rule), Action(answer.dry_action)
    )


def _rank(rule: Rule, network: IPNetwork) -> int:
    return (network.prefixlen + MAPPED[network.version] + 1) << 4 | rule.order  # enum rank of policy.h


def any_of(version: int) -> IPAddress:
    """The unspecified address of an IP version."""
    return ip_address("0.0.0.0" if version == 4 else "::")


def told(address: SocketAddress) -> str:
    """An address and its port, as they are written."""
    return f"{address.ip}:{address.port}" if address.ip.version == 4 else f"[{address.ip}]:{address.port}"


def sample(network: IPNetwork) -> list[IPAddress]:
    """The first, the middle and the last address of a network, each once."""
    first, last = network.network_address, network.broadcast_address
    middle = type(first)((int(first) + int(last)) // 2)
    return list(dict.fromkeys((first, middle, last)))


def targets(judge: Judge, version: int, port: int | None = None) -> tuple[list[SocketAddress], bool]:
    """The listeners of one IP version, on one port or on all, and whether there are any; where there are none, a
    target that stands for one."""
    found = [at for at in judge.listeners(port) if at.ip.version == version]
    if found:
        return sorted(found, key=lambda at: (at.port, at.ip.packed))[:_MOST_TARGETS], True
    return [SocketAddress(any_of(version), port or _ASSUMED_PORT)], False


def unheard(judge: Judge, rules: Sequence[Rule]) -> list[str]:
    """Of a set that has come into force: which of its first rules are not found."""
    return judge.unheard(rules[:SAMPLE_OF_SET])


def enforcement(
    judge: Judge, network: IPNetwork, port: int | None, wanted: Callable[[Decision], bool], name: str = ""
) -> Json:
    """Ask what is decided after a change about ``network`` and a listener's ``port``; ``wanted`` says whether that is
    what the change is for, ``name`` is that of its rule.

    ``state`` is ``all``, ``some`` or ``none`` of what was asked. ``otherwise`` has examples of decisions that differ,
    ``before`` those of which another rule made the same decision.
    """
    asked, listening = targets(judge, network.version, port)
    unguarded = [
        f"{told(at)} is {why}"
        for at, why in judge.unguarded().items()
        if at.ip.version == network.version and port in (None, at.port)
    ]
    decisions = judge.decide(itertools.product(sample(network), asked))
    good = [decision for decision in decisions if wanted(decision)]
    other = [decision for decision in decisions if not wanted(decision)]
    before = [decision for decision in good if name and decision.verdict.rule != name]
    return {
        "state": "all" if not other else "some" if good else "none",
        "asked": len(decisions),
        "listening": listening,
        "serving": judge.serving,
        "unguarded": unguarded,
        "guarded": len(set(asked) - judge.unguarded().keys()) if listening else 0,
        "otherwise": _examples(other),
        "before": _examples(before) if len(before) == len(decisions) else [],
    }


def _examples(decisions: Iterable[Decision]) -> list[Json]:
    """One for each that decided."""
    found: dict[str, Json] = {}
    for decision in decisions:
        found.setdefault(decision.by, decision.json())
    return list(found.values())[:_EXAMPLES]

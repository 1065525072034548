"""What a gate answers: values, made of the control API's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import cast

from ..control.api import Json

__all__ = ["BanEntry", "Change", "Counters", "Decision", "Difference", "GateEvent", "Loaded", "RuleEntry"]


@dataclass(frozen=True, slots=True)
class Change:
    """A change that was made. ``sources`` is of how many sources, ``revision`` the policy's after it.

    ``enforced`` is what those who decide answer: True if it is so for all that were asked, False where something comes
    before it (``why`` says what), None where no server runs whose programs could be asked.
    """

    sources: int
    revision: int
    enforced: bool | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is decided for a connection. ``action`` is ``allow``, ``drop`` or ``reject``; ``stage`` says which part of
    the policy decided (``failsafe``, ``ban``, ``rule``, ``limit``, ``default``), ``rule`` by which rule."""

    source: IPv4Address | IPv6Address
    listener: str
    action: str
    stage: str
    rule: str
    dry_run: str = ""

    @property
    def allowed(self) -> bool:
        """Whether it gets in."""
        return self.action == "allow"


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """A rule in force. ``sources`` are the first thousand of ``source_count``; ``expires_in`` is seconds."""

    name: str
    sources: tuple[str, ...]
    source_count: int
    action: str
    port: int | None
    dry_run: bool
    hits: int
    dry_hits: int
    expires_in: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class BanEntry:
    """A ban in force. ``expires_in`` is seconds."""

    source: str
    action: str
    hits: int
    expires_in: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Counters:
    """How many verdicts took effect, by (hook, stage, action), since the maps were made. ``silent_rejects``: how many
    that were to get RST got silence."""

    verdicts: Mapping[tuple[str, str, str], int]
    silent_rejects: int

    @property
    def allowed(self) -> int:
        """How many got in."""
        return sum(count for (_, _, action), count in self.verdicts.items() if action == "allow")

    @property
    def denied(self) -> int:
        """How many did not."""
        return sum(self.verdicts.values()) - self.allowed


@dataclass(frozen=True, slots=True)
class Loaded:
    """A set that was put into force. ``confirm_within`` is how many seconds there are to confirm it."""

    revision: int
    rules: int
    prefixes: int
    confirm_within: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """What loading a set would change: names of rules and of settings."""

    same: bool
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    settings: tuple[str, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class GateEvent:
    """A verdict that took effect. ``lost`` is how many came between the event before and this one, and were not kept:
    there is a rate in the kernel, and a bound on those that wait for a slow reader."""

    time: datetime
    source: IPv4Address | IPv6Address
    port: int
    rule: str
    action: str
    stage: str
    hook: str
    dry_run: str = ""
    lost: int = 0


def event_of(row: Json, lost: int) -> GateEvent:
    """Make an event of its JSON."""
    dry = row.get("dry_run")
    return GateEvent(
        datetime.fromisoformat(str(row["time"])),
        ip_address(str(row["source"])),
        cast("int", row["port"]),
        str(row["rule"]),
        str(row["action"]),
        str(row["stage"]),
        str(row["hook"]),
        str(dry["rule"]) if isinstance(dry, dict) else "",
        lost,
    )


def change_of(result: Json, sources: int) -> Change:
    """Make a change of the answer to one."""
    revision = cast("int", result["revision"])
    enforced = result.get("enforced")
    if not isinstance(enforced, dict):
        return Change(sources, revision)
    if not enforced["serving"] and not enforced.get("guards"):
        return Change(sources, revision, None, "no server runs: it is in force when one starts")
    if enforced["state"] is None:
        return Change(sources, revision, None, f"the kernel could not be asked: {enforced['why']}")
    unguarded = [str(text) for text in enforced["unguarded"]]
    others = [f"{row['by']} comes first ({row['source']} to {row['listener']})" for row in enforced["otherwise"]]
    return Change(sources, revision, not others and not unguarded, "; ".join([*unguarded, *others]))


def decision_of(row: Json, source: object) -> Decision:
    """Make a decision of its JSON."""
    dry = row.get("dry_run")
    return Decision(
        ip_address(str(source)),
        str(row["listener"]),
        str(row["action"]),
        str(row["stage"]),
        str(row["rule"]),
        str(dry["rule"]) if isinstance(dry, dict) else "",
    )


def rule_of(row: Json) -> RuleEntry:
    """Make a rule of its JSON."""
    return RuleEntry(
        str(row["name"]),
        tuple(cast("list[str]", row["sources"])),
        cast("int", row["source_count"]),
        str(row["action"]),
        cast("int | None", row["port"]),
        bool(row["dry_run"]),
        cast("int", row["hits"]),
        cast("int", row["dry_hits"]),
        cast("float | None", row["expires_in"]),
        str(row["reason"]),
    )


def ban_of(row: Json) -> BanEntry:
    """Make a ban of its JSON."""
    return BanEntry(
        str(row["address"]),
        str(row["action"]),
        cast("int", row["hits"]),
        cast("float | None", row["expires_in"]),
        str(row["reason"]),
    )


def difference_of(row: Json) -> Difference:
    """Make a difference of its JSON."""

    def names(key: str) -> tuple[str, ...]:
        return tuple(str(rule["name"]) for rule in cast("list[Json]", row[key]))

    settings = tuple(cast("Json", row["settings"]))
    return Difference(
        bool(row["same"]), names("added"), names("removed"), names("changed"), settings, cast("int", row["revision"])
    )

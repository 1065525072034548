"""The meaning of a policy, in its plainest form.

This is the definition that the kernel programs and the stores are tested against, not the fast path: it looks at
every rule. See ``docs/policy.md`` for the same in words.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.address import IPAddress, unmap
from .prefixes import IPNetwork, unmap_network
from .rule import Action, Rule, Stage, SynLimit, Verdict

__all__ = ["Policy", "match"]


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy. ``bans`` maps a network (never an IPv4-mapped one) to (action, expiry or None)."""

    rules: tuple[Rule, ...] = ()
    failsafe: tuple[IPNetwork, ...] = ()
    failsafe_ports: frozenset[int] = frozenset()
    bans: dict[IPNetwork, tuple[Action, int | None]] = field(default_factory=dict)
    default: Action = Action.ALLOW
    per_source: SynLimit | None = None
    overall: SynLimit | None = None


def match(policy: Policy, source: IPAddress, port: int, now: int) -> Verdict:
    """Judge a connection attempt from ``source`` to the listener on ``port`` at ``now`` (CLOCK_BOOTTIME, ns).

    Rates are not judged here: a limit that decides is reported as allowed, naming its rule.
    """
    source = unmap(source)
    if port in policy.failsafe_ports or any(source in unmap_network(network) for network in policy.failsafe):
        return Verdict(Action.ALLOW, Stage.FAILSAFE)
    for network in sorted(policy.bans, key=lambda network: network.prefixlen, reverse=True):
        action, expires = policy.bans[network]
        if source in network and (expires is None or now < expires):
            return Verdict(action, Stage.BAN, "ban")

    candidates = []
    for position, rule in enumerate(policy.rules):
        if rule.port not in (None, port):
            continue
        if rule.expires is not None and now >= rule.expires:
            continue
        for network in rule.sources:
            if source in network:
                # The longest prefix; then the order of rules of one prefix; then as written.
                candidates.append(((-network.prefixlen, -rule.order, position), rule))
    dry: Rule | None = None
    for _, rule in sorted(candidates, key=lambda candidate: candidate[0]):
        if rule.dry_run:
            dry = dry or rule
            continue
        action = Action.ALLOW if rule.action is Action.LIMIT else rule.action
        return Verdict(action, Stage.RULE, rule.name, dry.name if dry else "", dry.action if dry else Action.NONE)
    return Verdict(
        policy.default, Stage.DEFAULT, "default", dry.name if dry else "", dry.action if dry else Action.NONE
    )

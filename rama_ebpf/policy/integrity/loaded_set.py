"""The loaded set: rows as its description says, and rules that the programs find for their sources."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence

from ...core.address import mapped
from ...kernel import abi, bpf
from ...kernel.witness import SourceQuestion, Witness
from ..compiler import MAPPED
from ..counters import number
from ..kernel_store import KernelStore
from ..kernel_tables import packed_rule
from ..prefixes import IPNetwork
from ..rule import PolicyError, Rule, boottime_ns
from .difference import ANY_PORT, BEFORE_RULES, Difference, slice_of
from .rows import RuleRows
from .set_content import SetContent

__all__ = ["SetCheck"]


class SetCheck:
    """Looks at the rules of the set in force, from the first to the last."""

    def __init__(self, store: KernelStore, witness: Witness, rows: RuleRows) -> None:
        self._store = store
        self._witness = witness
        self._rows = rows
        self._set: tuple[int, Sequence[Rule], Sequence[int]] = (0, (), ())
        self._next_rule = 0
        self._content = SetContent(store)

    @property
    def rules(self) -> Sequence[Rule]:
        """The rules of the set that was looked at last."""
        return self._set[1]

    def look(self, least: int, rounds: int) -> Iterator[Difference]:
        """Look at a slice."""
        if why := self._unreadable():
            yield Difference("set", f"the set in force cannot be read: {why}", lambda: bool(self._unreadable()), _leave)
            return
        token, rules, ids = self._set
        if self._content.differs_so_far():
            yield Difference(
                "set", "another program has written into the set in force", self._content.differs, self.load_again
            )
            return
        count = min(len(rules), slice_of(len(rules), least, rounds))
        now = boottime_ns()
        asked: list[tuple[Rule, IPNetwork]] = []
        for step in range(count):
            index = (self._next_rule + step) % len(rules)
            rule, rule_id = rules[index], ids[index]
            if self._differs(rule, rule_id):
                yield Difference(
                    "row",
                    f"rule {rule.name} of the set has another row than was loaded",
                    lambda rule=rule, rule_id=rule_id: self._loaded()[0] == token and self._differs(rule, rule_id),  # type: ignore[misc]
                    lambda rule=rule, rule_id=rule_id: self._mend_set_row(token, rule, rule_id),  # type: ignore[misc]
                )
            elif rule.sources and not rule.dry_run and (rule.expires is None or now < rule.expires):
                asked.append((rule, rule.sources[random.randrange(len(rule.sources))]))
        self._next_rule = (self._next_rule + count) % max(1, len(rules))
        for (rule, network), found in zip(asked, self._found(asked), strict=True):
            if not found:
                yield Difference(
                    "set",
                    f"the programs do not find rule {rule.name} of the set for {network}",
                    lambda pair=(rule, network): self._loaded()[0] == token and not self._found([pair])[0],  # type: ignore[misc]
                    self.load_again,
                )

    def _unreadable(self) -> str:
        try:
            self._loaded()
        except PolicyError as error:
            return str(error)
        return ""

    def _loaded(self) -> tuple[int, Sequence[Rule], Sequence[int]]:
        """The set in force: its token, its rules, and their ids."""
        tables = self._store.tables
        gate = tables.gate()
        which = gate.in_force(boottime_ns())
        opened = tables.sets.open(which)
        try:
            if opened.token != self._set[0]:
                head = gate.sets[which]
                rules, ids = opened.ruleset(head).rules, array("Q", opened.ids(head))
                self._set = (opened.token, rules, ids) if len(rules) == len(ids) else (0, (), ())
        finally:
            opened.close()
        return self._set

    def _differs(self, rule: Rule, rule_id: int) -> bool:
        return self._rows.row(number(rule_id)) != packed_rule(rule) or self._rows.info(number(rule_id)) is None

    def _mend_set_row(self, token: int, rule: Rule, rule_id: int) -> None:
        maps = self._store.tables.maps
        with self._store.held():
            if self._loaded()[0] != token:
                return
            info = abi.RULE_INFO.pack(0, rule.name.encode(), rule.origin.encode(), rule.reason.encode())
            if self._rows.info(number(rule_id)) is None:
                bpf.map_update(maps["rule_info"], number(rule_id), info)
            bpf.map_update(maps["rules"], number(rule_id), packed_rule(rule))

    def _found(self, asked: Sequence[tuple[Rule, IPNetwork]]) -> list[bool]:
        answers = self._witness.ask(
            SourceQuestion(mapped(network.network_address), rule.port or ANY_PORT) for rule, network in asked
        )
        shift = abi.constants()["RANK_LENGTH_SHIFT"]
        return [
            answer.stage in BEFORE_RULES
            or answer.loaded[0] >= (network.prefixlen + MAPPED[network.version] + 1 << shift) | rule.order
            for (rule, network), answer in zip(asked, answers, strict=True)
        ]

    def load_again(self) -> None:
        """Make the set anew: from disk, or of its description."""
        self._store.repairs.load_again()


def _leave() -> None:
    """Nothing here can put it in order: it takes a load."""

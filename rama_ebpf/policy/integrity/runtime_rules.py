"""The rules at run time in the kernel: announced, with the row that they must have, and found by the programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv6Network

from ...kernel import abi, bpf
from ...kernel.gate_state import GateState
from ...kernel.map_walk import MapWalk
from ...kernel.witness import Answer, SourceQuestion, Witness
from ..kernel_store import KernelStore
from ..prefixes import IPNetwork, unmap_network
from ..rule import PRECEDENCE, RUNTIME, Action, boottime_ns
from .difference import ANY_PORT, BEFORE_RULES, Difference, slice_of
from .rows import MAPPED_IPV4, RuleRows

__all__ = ["RuntimeCheck"]


class RuntimeCheck:
    """``met`` are the keys that were looked at last."""

    def __init__(self, store: KernelStore, witness: Witness, rows: RuleRows) -> None:
        self._store = store
        self._witness = witness
        self._constant = abi.constants()
        self._walk = MapWalk(store.tables.maps["runtime"], abi.RUNTIME_KEY.size, 4)
        self._rows = rows
        self.met: list[bytes] = []

    @property
    def networks(self) -> list[IPNetwork]:
        """The prefixes of the rules that were looked at last."""
        keys = (abi.RUNTIME_KEY.unpack(key) for key in self.met)
        return [unmap_network(IPv6Network((packed, length))) for length, _, packed in keys]

    def look(self, least: int, rounds: int) -> Iterator[Difference]:
        """Look at a slice."""
        rows = self._walk.next(slice_of(self._walk.known, least, rounds))
        self.met = [key for key, _ in rows]
        gate, asked, now = self._store.tables.gate(), [], boottime_ns()
        for key, value in rows:
            if self._unannounced(key, gate):
                yield Difference(
                    "length",
                    f"the programs do not look for rules like that for {_place(key)}",
                    lambda key=key: self._is_there(key) and self._unannounced(key, self._store.tables.gate()),  # type: ignore[misc]
                    self._store.rebuild,
                )
            elif (row := self._right_row(key, value)) is None:
                yield Difference(
                    "row",
                    f"the rule at run time for {_place(key)} has no row, or a wrong one",
                    lambda key=key: self._has_wrong_row(key),  # type: ignore[misc]
                    lambda key=key: self._mend_row(key),  # type: ignore[misc]
                )
            elif _decides(row, now):
                asked.append((key, row))
        for (key, row), answer in zip(asked, self._ask(asked), strict=True):
            if self._is_missed(key, row, answer):
                yield Difference(
                    "rule",
                    f"the programs do not find the rule at run time for {_place(key)}",
                    lambda key=key: self._is_lost(key),  # type: ignore[misc]
                    self._store.rebuild,
                )

    def _ask(self, asked: Sequence[tuple[bytes, bytes]]) -> list[Answer]:
        return self._witness.ask(
            SourceQuestion(packed, port or ANY_PORT)
            for _, port, packed in (abi.RUNTIME_KEY.unpack(key) for key, _ in asked)
        )

    def _unannounced(self, key: bytes, gate: GateState) -> bool:
        length, port, packed = abi.RUNTIME_KEY.unpack(key)
        family = not (length >= 96 and packed.startswith(MAPPED_IPV4))
        if port and not gate.flags & self._constant["GATE_RUNTIME_PORTS"]:
            return True
        return not gate.runtime[family] >> length & 1

    def _is_there(self, key: bytes) -> bool:
        return self._rows.place(key) is not None

    def _right_row(self, key: bytes, value: bytes) -> bytes | None:
        """The row of a rule if it can be that of a rule at run time at this place, else None."""
        row = self._rows.row(value)
        if row is None or self._rows.info(value) is None:
            return None
        action = abi.RULE.unpack(row)[0]
        return row if action in PRECEDENCE and row == self._derived(key, row, Action(action)) else None

    def _derived(self, key: bytes, row: bytes, action: Action) -> bytes:
        """The row with all that follows from its other members, and from where the rule stands."""
        _, flags, expires, emission, tolerance, *_ = abi.RULE.unpack(row)
        _, port, _ = abi.RUNTIME_KEY.unpack(key)
        dry_run = flags & self._constant["RULE_DRY_RUN"]
        certain = not port and not expires and not dry_run
        flags = dry_run | self._constant["RULE_CERTAIN"] * certain
        order = 8 * (port != 0) + 2 * PRECEDENCE[action] + 1
        return abi.RULE.pack(action, flags, expires, emission, tolerance, port, order, 0)

    def _has_wrong_row(self, key: bytes) -> bool:
        value = self._rows.place(key)
        return value is not None and self._right_row(key, value) is None

    def _mend_row(self, key: bytes) -> None:
        """Write the row as it must be. Where nothing says what the action was its description's name does, and what
        cannot be known turns the source away."""
        maps = self._store.tables.maps
        with self._store.held():
            value = self._rows.place(key)
            if value is None:
                return
            row = self._rows.row(value) or bytes(abi.RULE.size)
            info = self._rows.info(value)
            action = abi.RULE.unpack(row)[0]
            if action not in PRECEDENCE or (action == Action.LIMIT and not abi.RULE.unpack(row)[3]):
                row, action = bytes(abi.RULE.size), _named_action(info)
                if action is Action.ALLOW:  # for how long is not known any more: better not at all
                    bpf.map_delete(maps["runtime"], key)
                    return
            if info is None:
                name = f"{Action(action).name.lower()}:{_place(key).partition(' ')[0]}"
                info = abi.RULE_INFO.pack(0, name.encode()[:63], RUNTIME.encode(), b"its description was lost")
                bpf.map_update(maps["rule_info"], value, info)
            bpf.map_update(maps["rules"], value, self._derived(key, row, Action(action)))

    def _is_missed(self, key: bytes, row: bytes, answer: Answer) -> bool:
        if answer.stage in BEFORE_RULES:
            return False
        length: int = abi.RUNTIME_KEY.unpack(key)[0]
        order: int = abi.RULE.unpack(row)[6]
        return answer.rank < (length + 1 << self._constant["RANK_LENGTH_SHIFT"]) | order

    def _is_lost(self, key: bytes) -> bool:
        value = self._rows.place(key)
        row = None if value is None else self._right_row(key, value)
        if row is None or not _decides(row, boottime_ns()):
            return False
        (answer,) = self._ask([(key, row)])
        return self._is_missed(key, row, answer)


def _decides(row: bytes, now: int) -> bool:
    _, flags, expires, *_ = abi.RULE.unpack(row)
    return not flags & abi.constants()["RULE_DRY_RUN"] and (not expires or now < expires)


def _place(key: bytes) -> str:
    length, port, packed = abi.RUNTIME_KEY.unpack(key)
    network = unmap_network(IPv6Network((packed, length)))
    return f"{network} port {port}" if port else str(network)


def _named_action(info: bytes | None) -> Action:
    """What the name that ``block`` and ``allow`` give says; DROP where nothing does."""
    if info is not None:
        name = abi.RULE_INFO.unpack(info)[1].partition(b":")[0].decode(errors="replace").upper()
        if name in ("ALLOW", "REJECT"):
            return Action[name]
    return Action.DROP

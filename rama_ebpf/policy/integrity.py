"""Whether a policy in the kernel is what its entries say: looked at in slices, and mended.

*Entries* (rules, bans, failsafe, the set's description) are what was asked for; what is *derived* from them (lengths,
flags, the rows that programs read, the intervals of a set) has to say the same. The programs themselves are asked
whether they find a rule: the rank of what they found must be no lower than the rule's.

All may raise OSError where the kernel refuses.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv6Network
from typing import Final

from ..core.address import IPAddress, mapped
from ..kernel import abi, bpf
from ..kernel.gate_state import GateState
from ..kernel.map_walk import MapWalk
from ..kernel.witness import Answer, SourceQuestion, Witness
from .compiler import MAPPED
from .counters import number
from .image import RuntimeRule
from .kept_walk import KeptWalk, Suspect
from .kernel_sets import KernelSet
from .kernel_store import KernelStore
from .kernel_tables import packed_rule, runtime_key
from .prefixes import IPNetwork, unmap_network
from .rule import PRECEDENCE, RUNTIME, Action, PolicyError, Rule, Stage, boottime_ns
from .tables import Place

__all__ = ["Difference", "Integrity"]

_MAPPED_IPV4: Final = b"\0" * 10 + b"\xff\xff"
_ANY_PORT: Final = 1080
"""The port to ask about where a rule has none."""
_LOOKS_AT_FEW_BANS: Final = 6
"""In so many calls all bans are compared with the disk, if they are few."""
_BANS_IN_A_ROUND: Final = 100_000
"""So many are compared in an hour."""
_MOST_LOST: Final = 32
"""Lost bans that are put back one by one in a call; the next call has the rest."""
_BEFORE_RULES: Final = (Stage.FAILSAFE, Stage.BAN)


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as it should be. ``persists`` looks again, to be called under the policy's lock: a writer
    may have been at work. ``mend`` puts it in order, and takes the lock itself."""

    kind: str
    what: str
    persists: Callable[[], bool]
    mend: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Remembered:
    """What a revision of the policy was, as it was seen under the lock. ``opened`` keeps its set alive."""

    gate: GateState
    failsafe: frozenset[IPNetwork]
    token: int
    opened: KernelSet

    def differs(self, gate: GateState) -> bool:
        return _whole(self.gate) != _whole(gate)


def _whole(gate: GateState) -> tuple[object, ...]:
    return gate.active, gate.fallback, gate.deadline, gate.sets, gate.failsafe_ports


class Integrity:
    """Looks at a kernel store's tables; close it when done. To be used by one thread at a time."""

    def __init__(self, store: KernelStore, witness: Witness) -> None:
        self._store = store
        self._witness = witness
        self._constant = abi.constants()
        self._remembered: _Remembered | None = None
        self._set: tuple[int, Sequence[Rule], Sequence[int]] = (0, (), ())
        self._next_rule = 0
        self._met: list[bytes] = []
        self._kept: KeptWalk | None = None
        self._until_bans = 0
        maps = store.tables.maps
        self._place = bpf.MapReader(maps["runtime"], abi.RUNTIME_KEY.size, 4)
        self._row = bpf.MapReader(maps["rules"], 4, abi.RULE.size)
        self._info = bpf.MapReader(maps["rule_info"], 4, abi.RULE_INFO.size)
        self._runtime = MapWalk(maps["runtime"], abi.RUNTIME_KEY.size, 4)
        self._bans = MapWalk(maps["bans"], maps.specs["bans"].key_size, abi.BAN.size)

    def close(self) -> None:
        """Let go of the set that is remembered, and of the file."""
        if self._kept is not None:
            self._kept.close()
        self._forget()

    def _forget(self) -> None:
        if self._remembered is not None:
            self._remembered.opened.close()
            self._remembered = None

    def look(self, least: int, rounds: int) -> Iterator[Difference]:
        """Look at the whole record and at a slice of each table: at least ``least`` entries, and all within ``rounds``
        calls. What comes later needs in order what came before."""
        yield from self._record()
        rows = self._runtime.next(max(least, -(-self._runtime.known // rounds)))
        self._met = [key for key, _ in rows]
        yield from self._runtime_rules(rows)
        yield from self._kept_rules(least, rounds)
        yield from self._set_rules(least, rounds)
        yield from self._banned(self._bans.next(max(least, -(-self._bans.known // rounds))))
        yield from self._lost_bans(rounds)

    def some_sources(self, count: int) -> list[IPAddress]:
        """Return sources at the edges of rules that were looked at last."""
        found: list[IPAddress] = []
        for key in random.sample(self._met, min(count, len(self._met))):
            length, _, packed = abi.RUNTIME_KEY.unpack(key)
            network = unmap_network(IPv6Network((packed, length)))
            found.append(random.choice((network.network_address, network.broadcast_address)))
        rules = self._set[1]
        for rule in random.choices(rules, k=count) if rules else ():
            if rule.sources:
                network = rule.sources[random.randrange(len(rule.sources))]
                found.append(random.choice((network.network_address, network.broadcast_address)))
        return found

    # -- the record ----------------------------------------------------------------------------------------------

    def _record(self) -> Iterator[Difference]:
        """Compare with what the same revision was. Whoever changes the policy raises the revision."""
        tables = self._store.tables
        if self._remembered is None or self._remembered.gate.revision != tables.gate().revision:
            self._remember()
            return
        known = self._remembered
        if known.differs(tables.gate()):
            yield Difference(
                "settings",
                f"the record of revision {known.gate.revision} (settings, set in force, failsafe's ports) was changed",
                lambda: self._same_revision(known) and known.differs(tables.gate()),
                lambda: self._put_back(known),
            )
        elif (token := self._token()) != known.token:
            yield Difference(
                "set",
                f"the set of revision {known.gate.revision} was exchanged for map {token}",
                lambda: self._same_revision(known) and self._token() != known.token,
                lambda: self._put_set_back(known),
            )
        if frozenset(tables.failsafe.networks()) != known.failsafe:
            yield Difference(
                "failsafe",
                f"the failsafe of revision {known.gate.revision} was changed",
                lambda: self._same_revision(known) and frozenset(tables.failsafe.networks()) != known.failsafe,
                lambda: self._store.set_failsafe(list(known.failsafe), known.gate.failsafe_ports),
            )
        yield from self._flags()

    def _flags(self) -> Iterator[Difference]:
        tables = self._store.tables
        for flag, what, is_empty in (
            ("GATE_BANS", "bans", tables.bans.is_empty),
            ("GATE_FAILSAFE", "failsafe", lambda: not tables.failsafe.networks() and not tables.gate().failsafe_ports),
        ):

            def missing(flag: str = flag, is_empty: Callable[[], bool] = is_empty) -> bool:
                return not is_empty() and not tables.gate().flags & self._constant[flag]

            if missing():
                yield Difference("flag", f"the programs do not look for the {what}", missing, self._store.rebuild)

    def _remember(self) -> None:
        tables = self._store.tables
        with self._store.held():
            gate = tables.gate()
            opened = tables.sets.open(gate.active)
            self._forget()
            self._remembered = _Remembered(gate, frozenset(tables.failsafe.networks()), opened.token, opened)

    def _same_revision(self, known: _Remembered) -> bool:
        return self._store.tables.gate().revision == known.gate.revision

    def _token(self) -> int:
        tables = self._store.tables
        opened = tables.sets.open(tables.gate().active)
        try:
            return opened.token
        finally:
            opened.close()

    def _put_back(self, known: _Remembered) -> None:
        """Put the record back, with a revision of its own: what is derived stays as it is."""
        tables, was = self._store.tables, known.gate
        with self._store.held():
            gate = tables.gate()
            tables.put_gate(
                replace(
                    gate,
                    revision=gate.revision + 1,
                    active=was.active,
                    fallback=was.fallback,
                    deadline=was.deadline,
                    sets=was.sets,
                    failsafe_ports=was.failsafe_ports,
                )
            )

    def _put_set_back(self, known: _Remembered) -> None:
        with self._store.held():
            self._store.tables.sets.put_back(known.gate.active, known.opened)

    # -- rules at run time ---------------------------------------------------------------------------------------

    def _runtime_rules(self, rows: Sequence[tuple[bytes, bytes]]) -> Iterator[Difference]:
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
            SourceQuestion(packed, port or _ANY_PORT)
            for _, port, packed in (abi.RUNTIME_KEY.unpack(key) for key, _ in asked)
        )

    def _unannounced(self, key: bytes, gate: GateState) -> bool:
        length, port, packed = abi.RUNTIME_KEY.unpack(key)
        family = not (length >= 96 and packed.startswith(_MAPPED_IPV4))
        if port and not gate.flags & self._constant["GATE_RUNTIME_PORTS"]:
            return True
        return not gate.runtime[family] >> length & 1

    def _is_there(self, key: bytes) -> bool:
        return self._place(key) is not None

    def _right_row(self, key: bytes, value: bytes) -> bytes | None:
        """The row of a rule if it can be that of a rule at run time at this place, else None."""
        row = self._row(value)
        if row is None or self._info(value) is None:
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
        value = self._place(key)
        return value is not None and self._right_row(key, value) is None

    def _mend_row(self, key: bytes) -> None:
        """Write the row as it must be. Where nothing says what the action was its description's name does, and what
        cannot be known turns the source away."""
        maps = self._store.tables.maps
        with self._store.held():
            value = self._place(key)
            if value is None:
                return
            row = self._row(value) or bytes(abi.RULE.size)
            info = self._info(value)
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
        if answer.stage in _BEFORE_RULES:
            return False
        length: int = abi.RUNTIME_KEY.unpack(key)[0]
        order: int = abi.RULE.unpack(row)[6]
        return answer.rank < (length + 1 << self._constant["RANK_LENGTH_SHIFT"]) | order

    def _is_lost(self, key: bytes) -> bool:
        value = self._place(key)
        row = None if value is None else self._right_row(key, value)
        if row is None or not _decides(row, boottime_ns()):
            return False
        (answer,) = self._ask([(key, row)])
        return self._is_missed(key, row, answer)

    # -- rules at run time on disk -------------------------------------------------------------------------------

    def _kept_rules(self, least: int, rounds: int) -> Iterator[Difference]:
        path = self._store.rules_on_disk
        if path is None:  # the disk is behind, and no witness
            return
        if self._kept is None:
            self._kept = KeptWalk(path, self._agrees, self._surely_agrees)
        kept = self._kept
        for suspect in kept.next(max(least, -(-kept.known // rounds))):
            network, port = suspect.place
            where = f"{network} port {port}" if port else str(network)
            has = (
                "is on disk, and not like that in the kernel"
                if suspect.rule
                else "was taken back, and is in the kernel"
            )
            yield Difference(
                "rule",
                f"the rule at run time for {where} {has}",
                lambda suspect=suspect: self._is_apart(kept, suspect),  # type: ignore[misc]
                lambda suspect=suspect: self._store.put_back(suspect.place, suspect.rule),  # type: ignore[misc]
            )
        kept.end()

    def _is_apart(self, kept: KeptWalk, suspect: Suspect) -> bool:
        if self._store.rules_on_disk is None or not kept.is_whole():
            return False
        one = suspect.rule
        if one is not None and one.rule.expires is not None and one.rule.expires <= boottime_ns():
            return False
        return not self._agrees(suspect.place, one)

    def _surely_agrees(self, row: Mapping[str, object]) -> bool:
        """The usual row of this boot, read without making a rule of it."""
        source, port = str(row["source"]), row["port"]
        address, _, length = source.partition("/")
        try:
            if ":" in address:
                key = abi.RUNTIME_KEY.pack(int(length), port, socket.inet_pton(socket.AF_INET6, address))
            else:
                packed = _MAPPED_IPV4 + socket.inet_pton(socket.AF_INET, address)
                key = abi.RUNTIME_KEY.pack(int(length) + 96, port, packed)
            value = self._place(key)
            if value is None or row.get("removed"):
                return value is None and bool(row.get("removed"))
            if row["limit"] is not None or row["dry_run"] or row["until"] is not None:
                return False
            action = Action[str(row["action"]).upper()]
            order = 8 * (port != 0) + 2 * PRECEDENCE[action] + 1
            flags = 0 if port else self._constant["RULE_CERTAIN"]
            return self._row(value) == abi.RULE.pack(action, flags, 0, 0, 0, port, order, 0)
        except (LookupError, ValueError, TypeError, OSError, struct.error):
            return False

    def _agrees(self, place: Place, one: RuntimeRule | None) -> bool:
        value = self._place(runtime_key(place))
        if value is None or one is None:
            return value is None and one is None
        row = self._row(value)
        return row == packed_rule(one.rule)

    # -- the loaded set ------------------------------------------------------------------------------------------

    def _set_rules(self, least: int, rounds: int) -> Iterator[Difference]:
        if why := self._unreadable():
            yield Difference("set", f"the set in force cannot be read: {why}", lambda: bool(self._unreadable()), _leave)
            return
        token, rules, ids = self._set
        count = min(len(rules), max(least, -(-len(rules) // rounds)))
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
        return self._row(number(rule_id)) != packed_rule(rule) or self._info(number(rule_id)) is None

    def _mend_set_row(self, token: int, rule: Rule, rule_id: int) -> None:
        maps = self._store.tables.maps
        with self._store.held():
            if self._loaded()[0] != token:
                return
            info = abi.RULE_INFO.pack(0, rule.name.encode(), rule.origin.encode(), rule.reason.encode())
            if self._info(number(rule_id)) is None:
                bpf.map_update(maps["rule_info"], number(rule_id), info)
            bpf.map_update(maps["rules"], number(rule_id), packed_rule(rule))

    def _found(self, asked: Sequence[tuple[Rule, IPNetwork]]) -> list[bool]:
        answers = self._witness.ask(
            SourceQuestion(mapped(network.network_address), rule.port or _ANY_PORT) for rule, network in asked
        )
        shift = self._constant["RANK_LENGTH_SHIFT"]
        return [
            answer.stage in _BEFORE_RULES
            or answer.loaded[0] >= (network.prefixlen + MAPPED[network.version] + 1 << shift) | rule.order
            for (rule, network), answer in zip(asked, answers, strict=True)
        ]

    def load_again(self) -> None:
        """Make the set anew of its description."""
        self._store.replace(self._store.ruleset(), origin="the audit")

    # -- bans ----------------------------------------------------------------------------------------------------

    def _banned(self, rows: Sequence[tuple[bytes, bytes]]) -> Iterator[Difference]:
        now = boottime_ns()
        keys = [key for key, value in rows if _lasts(value, now)]
        answers = self._witness.ask(SourceQuestion(key[:16], _ANY_PORT) for key in keys)
        for key, answer in zip(keys, answers, strict=True):
            if answer.stage not in _BEFORE_RULES:
                yield Difference(
                    "ban",
                    f"the programs do not find the ban of {unmap_network(IPv6Network(key[:16])).network_address}",
                    lambda key=key: self._is_missed_ban(key),  # type: ignore[misc]
                    self._store.rebuild,
                )

    def _lost_bans(self, rounds: int) -> Iterator[Difference]:
        """Compare all with the disk, now and then: the more there are, the less often."""
        self._until_bans -= 1
        if self._until_bans > 0:
            return
        count, lost = self._store.lost_bans()
        self._until_bans = max(_LOOKS_AT_FEW_BANS, count * rounds // _BANS_IN_A_ROUND)
        for ban in lost[:_MOST_LOST]:
            yield Difference(
                "ban",
                f"the ban of {ban.network} is on disk, and not in the kernel",
                lambda ban=ban: ban.network in {one.network for one in self._store.lost_bans()[1]},  # type: ignore[misc]
                lambda ban=ban: self._store.bring_back_ban(ban),  # type: ignore[misc]
            )

    def _is_missed_ban(self, key: bytes) -> bool:
        value = bpf.map_lookup(self._store.tables.maps["bans"], key, abi.BAN.size)
        if value is None or not _lasts(value, boottime_ns()):
            return False
        (answer,) = self._witness.ask([SourceQuestion(key[:16], _ANY_PORT)])
        return answer.stage not in _BEFORE_RULES


def _leave() -> None:
    """Nothing here can put it in order: it takes a load."""


def _decides(row: bytes, now: int) -> bool:
    _, flags, expires, *_ = abi.RULE.unpack(row)
    return not flags & abi.constants()["RULE_DRY_RUN"] and (not expires or now < expires)


def _lasts(ban: bytes, now: int) -> bool:
    expires = int.from_bytes(ban[:8], sys.byteorder)
    return not expires or now < expires


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

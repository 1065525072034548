"""The BPF maps that the kernel programs read, as tables: keys and values packed as ``bpf/policy.h`` says."""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Sequence
from ipaddress import IPv6Network
from typing import Final

from ..core.address import IPAddress, mapped
from ..kernel import abi, bpf
from ..kernel.gate_maps import GateMaps
from ..kernel.gate_state import GateState
from .clients import KernelClients
from .compiler import MAPPED
from .counters import number
from .kernel_bans import KernelBanTable
from .kernel_sets import KernelSets
from .loaded_set import packed_limit, unpacked_limit
from .prefixes import IPNetwork, Prefixes, unmap_network
from .rule import Action, PolicyError, Rule, source_text
from .stored import StoredRule
from .tables import Place, TableFull

__all__ = ["KernelTables", "packed_rule", "runtime_key"]

_FULL: Final = (errno.E2BIG, errno.ENOSPC, errno.ENOMEM)
_CROWDED: Final = 64
"""Where so many ids in a row are taken, or there are few, the rules are counted; else there is room."""
_FEW: Final = 4096
_ROWS: Final = 16_384
_MAPPED: Final = bytes(10) + b"\xff\xff"
_EXPIRES: Final = struct.Struct(f"=8xQ{abi.RULE.size - 16}x")  # of struct rule


class KernelTables:
    """The tables in a gate's maps. Sets are in :mod:`.kernel_sets`."""

    kind = "kernel"

    def __init__(self, maps: GateMaps, owner: int = 0) -> None:
        self.owner = owner
        self.most_lengths = abi.constants()["MAX_RUNTIME_LENGTHS"]
        self.use(maps)

    def use(self, maps: GateMaps) -> None:
        """Work on these maps from now on."""
        self.maps = maps
        self.rules = _Rules(maps)
        self.runtime = _Runtime(maps["runtime"])
        self.bans = KernelBanTable(maps)
        self.failsafe = _Failsafe(maps["failsafe"])
        self.sets = KernelSets(maps)
        self.clients = KernelClients(maps, self.rules.get)
        self.written: GateState | None = None
        """The record as this process wrote it last."""

    def gate(self) -> GateState:
        raw = bpf.map_lookup(self.maps["gate"], number(0), abi.GATE.size)
        assert raw is not None  # an array has all its elements
        return GateState.unpack(raw)

    def put_gate(self, gate: GateState) -> None:
        bpf.map_update(self.maps["gate"], number(0), gate.pack())
        self.written = gate

    def due(self, bucket: int, source: IPAddress) -> int | None:
        packed = b"" if bucket == abi.constants()["BUCKET_GLOBAL"] else mapped(source)[8 * (source.version == 4) :][:8]
        raw = bpf.map_lookup(self.maps["buckets"], abi.BUCKET_KEY.pack(bucket, 0, packed), 8)
        return None if raw is None else int.from_bytes(raw, sys.byteorder)

    def too_many_rules(self, what: str) -> PolicyError:
        size = self.rules.most
        return PolicyError(
            f"cannot add {what}: the policy holds its {size - 1} rules already; remove some, load many sources as one "
            f"rule (policy load), or restart with --max-rules above {size}"
        )

    def check_size(self, rules: int, runtime: int) -> None:
        if runtime + rules >= self.rules.most:
            beside = f" beside the {runtime} at run time" if runtime else ""
            raise PolicyError(
                f"a set of {rules} rules{beside} does not fit: the policy holds {self.rules.most - 1} rules; restart "
                f"with --max-rules above {self.rules.most}"
            )

    def too_many_bans(self, network: IPNetwork) -> PolicyError:
        size = self.maps.capacity("bans")
        return PolicyError(
            f"cannot ban {source_text(network)}: {size} sources are banned already; lift some, or restart with "
            f"--max-bans above {size}"
        )


def _put(fd: int, key: bytes, value: bytes) -> None:
    try:
        bpf.map_update(fd, key, value)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise TableFull from error


def _delete_all(fd: int, keys: list[bytes]) -> None:
    while keys:
        done = bpf.map_delete_batch(fd, b"".join(keys), len(keys))
        keys = keys[done + 1 :]  # that one is not there


def packed_rule(rule: Rule) -> bytes:
    """Return a rule as the programs read it, ``struct rule``."""
    constant = abi.constants()
    certain = rule.port is None and rule.expires is None and not rule.dry_run
    flags = constant["RULE_DRY_RUN"] * rule.dry_run | constant["RULE_CERTAIN"] * certain
    fields = (rule.action, flags, rule.expires or 0, *packed_limit(rule.limit), rule.port or 0, rule.order, 0)
    return abi.RULE.pack(*fields)


class _Rules:
    """The maps ``rule_info`` (which also says what ids are taken), ``rules`` and ``rule_hits``."""

    def __init__(self, maps: GateMaps) -> None:
        self.most = maps.sizes.rules
        self.ids = maps.capacity("rules")
        self._info, self._rules, self._hits = maps["rule_info"], maps["rules"], maps["rule_hits"]
        self._dry_run = abi.constants()["RULE_DRY_RUN"]

    def add(self, rule_id: int, rule: Rule, created: int) -> bool:
        info = abi.RULE_INFO.pack(created, rule.name.encode(), rule.origin.encode(), rule.reason.encode())
        try:
            bpf.map_update(self._info, number(rule_id), info, bpf.BPF_NOEXIST)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise TableFull from error
        hits = bytes(abi.RULE_HITS.size * abi.possible_cpus())
        bpf.map_update(self._hits, number(rule_id), hits)
        bpf.map_update(self._rules, number(rule_id), packed_rule(rule))
        return True

    def add_alike(self, ids: Sequence[int], names: Sequence[str], model: Rule, created: int) -> None:
        rest, pack = (model.origin.encode(), model.reason.encode()), abi.RULE_INFO.pack
        hits, rule = bytes(abi.RULE_HITS.size * abi.possible_cpus()), packed_rule(model)
        for at in range(0, len(ids), _ROWS):
            part = ids[at : at + _ROWS]
            keys = b"".join(map(number, part))
            infos = b"".join([pack(created, name.encode(), *rest) for name in names[at : at + _ROWS]])
            for fd, values in ((self._info, infos), (self._hits, hits * len(part)), (self._rules, rule * len(part))):
                if bpf.map_update_batch(fd, keys, values, len(part)) < len(part):
                    raise TableFull

    def get(self, rule_id: int) -> StoredRule | None:
        info = bpf.map_lookup(self._info, number(rule_id), abi.RULE_INFO.size)
        raw = bpf.map_lookup(self._rules, number(rule_id), abi.RULE.size)
        if info is None or raw is None:
            return None
        action, flags, expires, emission, tolerance, port, order, _ = abi.RULE.unpack(raw)
        if action == Action.NONE:
            return None
        created, name, origin, reason = abi.RULE_INFO.unpack(info)
        return StoredRule(
            rule_id,
            _text(name),
            Action(action),
            port or None,
            expires or None,
            bool(flags & self._dry_run),
            unpacked_limit(emission, tolerance),
            _text(reason),
            _text(origin),
            created,
            order,
        )

    def drop(self, rule_id: int) -> None:
        bpf.map_update(self._rules, number(rule_id), bytes(abi.RULE.size))
        bpf.map_delete(self._info, number(rule_id))

    def drop_all(self, ids: Sequence[int]) -> None:
        for at in range(0, len(ids), _ROWS):
            part = ids[at : at + _ROWS]
            keys = b"".join(map(number, part))
            bpf.map_update_batch(self._rules, keys, bytes(abi.RULE.size * len(part)), len(part))
            _delete_all(self._info, [number(rule_id) for rule_id in part])

    def known(self) -> set[int]:
        rows = bpf.map_lookup_batch(self._info, 4, abi.RULE_INFO.size)
        return {int.from_bytes(key, sys.byteorder) for key, _ in rows}

    def have_room(self, count: int) -> bool:
        return count < self.most

    def is_overfull(self, tries: int) -> bool:
        return (tries >= _CROWDED or self.ids <= _FEW) and len(self.known()) >= self.most

    def next_end(self, now: int) -> int | None:
        # All rows, 5 MB: 10 ms. Rules that end may be few, and none knows where.
        token, earliest = None, None
        while True:
            _, rows, token = bpf.map_lookup_slice(self._rules, 4, abi.RULE.size, token, _ROWS)
            ends = [end for (end,) in _EXPIRES.iter_unpack(rows) if end > now]
            earliest = min([*ends, *([] if earliest is None else [earliest])], default=None)
            if token is None:
                return earliest

    def hits(self, rule_id: int) -> tuple[int, int]:
        raw = bpf.map_lookup(self._hits, number(rule_id), abi.RULE_HITS.size * abi.possible_cpus())
        assert raw is not None  # an array has all its elements
        rows = list(abi.RULE_HITS.iter_unpack(raw))
        return sum(row[0] for row in rows), sum(row[1] for row in rows)


class _Runtime:
    """The map ``runtime``."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def get(self, place: Place) -> int | None:
        raw = bpf.map_lookup(self._fd, runtime_key(place), 4)
        return None if raw is None else int.from_bytes(raw, sys.byteorder)

    def put(self, place: Place, rule_id: int) -> None:
        _put(self._fd, runtime_key(place), number(rule_id))

    def drop(self, place: Place) -> bool:
        return bpf.map_delete(self._fd, runtime_key(place))

    def is_empty(self) -> bool:
        return bpf.map_next_key(self._fd, None, abi.RUNTIME_KEY.size) is None

    def items(self) -> list[tuple[Place, int]]:
        rows = []
        for key, value in bpf.map_lookup_batch(self._fd, abi.RUNTIME_KEY.size, 4):
            length, port, packed = abi.RUNTIME_KEY.unpack(key)
            rows.append(((_network(packed, length), port), int.from_bytes(value, sys.byteorder)))
        return rows

    def exchange(self, prefixes: Prefixes, port: int, ids: Sequence[int | None]) -> list[int | None]:
        keys = runtime_keys(prefixes, port)
        found = self._values(keys)
        wanted = [None if one is None else number(one) for one in ids]
        try:
            self._put_all(keys, wanted, found)
        except (TableFull, OSError):
            self._put_all(keys, found, [wanted[at] or value for at, value in enumerate(found)])
            raise
        return [None if value is None else int.from_bytes(value, sys.byteorder) for value in found]

    def get_all(self, prefixes: Prefixes, port: int) -> list[int | None]:
        found = self._values(runtime_keys(prefixes, port))
        return [None if value is None else int.from_bytes(value, sys.byteorder) for value in found]

    def _values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if self.is_empty():
            return [None] * len(keys)
        if len(keys) <= _FEW:
            return [bpf.map_lookup(self._fd, key, 4) for key in keys]
        present = dict(bpf.map_lookup_batch(self._fd, abi.RUNTIME_KEY.size, 4))
        return [present.get(key) for key in keys]

    def _put_all(self, keys: Sequence[bytes], wanted: Sequence[bytes | None], present: Sequence[bytes | None]) -> None:
        """Have what is wanted; ``present`` says where there may be something."""
        rows = [(key, value) for key, value in zip(keys, wanted, strict=True) if value is not None]
        values = b"".join([value for _, value in rows])
        if bpf.map_update_batch(self._fd, b"".join([key for key, _ in rows]), values, len(rows)) < len(rows):
            raise TableFull
        going = [key for key, new, old in zip(keys, wanted, present, strict=True) if new is None and old is not None]
        _delete_all(self._fd, going)


class _Failsafe:
    """The map ``failsafe``, a trie of both lists: see ``enum failsafe_bit`` in policy.h."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        constant = abi.constants()
        self._covered, self._named = constant["FAILSAFE_COVERED"], constant["FAILSAFE_NAMED"]

    def fill(self, which: int, networks: Sequence[IPNetwork]) -> None:
        present = self._rows()
        lists = [[key for key, value in present.items() if value & self._named << n] for n in (0, 1)]
        lists[which] = [_failsafe_key(network) for network in networks]
        wanted = self._implied(lists)
        for key, value in wanted.items():
            if present.get(key) != value:
                bpf.map_update(self._fd, key, number(value))
        for key in present.keys() - wanted.keys():
            bpf.map_delete(self._fd, key)

    def networks(self, which: int) -> list[IPNetwork]:
        keys = [key for key, value in self._rows().items() if value & self._named << which]
        return [_network(packed, length - 32) for length, _, packed in map(abi.FAILSAFE_KEY.unpack, keys)]

    def covers(self, which: int, source: IPAddress) -> bool:
        key = abi.FAILSAFE_KEY.pack(32 + 128, source.version == 4, mapped(source))
        raw = bpf.map_lookup(self._fd, key, 4)
        return raw is not None and bool(int.from_bytes(raw, sys.byteorder) & self._covered << which)

    def is_sound(self) -> bool:
        present = self._rows()
        lists = [[key for key, value in present.items() if value & self._named << n] for n in (0, 1)]
        return present == self._implied(lists)

    def _rows(self) -> dict[bytes, int]:
        rows = bpf.map_lookup_batch(self._fd, abi.FAILSAFE_KEY.size, 4)
        return {key: int.from_bytes(value, sys.byteorder) for key, value in rows}

    def _implied(self, lists: Sequence[Sequence[bytes]]) -> dict[bytes, int]:
        """All rows that there have to be for two lists."""
        found: dict[bytes, int] = {}
        for which, keys in enumerate(lists):
            for key in keys:
                found[key] = found.get(key, 0) | self._named << which
        named = [{abi.FAILSAFE_KEY.unpack(key) for key in keys} for keys in lists]
        lengths = [{length for length, _, _ in keys} for keys in named]
        for key in found:
            length, family, packed = abi.FAILSAFE_KEY.unpack(key)
            for which in (0, 1):
                around = (one for one in lengths[which] if one <= length)
                if any((one, family, _cut(packed, one - 32)) in named[which] for one in around):
                    found[key] |= self._covered << which
        return found


def _cut(packed: bytes, length: int) -> bytes:
    """An address with all bits behind the first ``length`` cleared."""
    return (int.from_bytes(packed, "big") >> 128 - length << 128 - length).to_bytes(16, "big")


def _mapped_length(network: IPNetwork) -> int:
    return network.prefixlen + MAPPED[network.version]


def runtime_key(place: Place) -> bytes:
    """Return where a rule of the runtime layer stands, ``struct runtime_key``."""
    network, port = place
    return abi.RUNTIME_KEY.pack(_mapped_length(network), port, mapped(network.network_address))


def runtime_keys(prefixes: Prefixes, port: int) -> list[bytes]:
    """:func:`runtime_key` of many, of one port."""
    heads = [struct.pack("=HH", length, port) for length in range(129)]
    return [
        heads[length + 96] + _MAPPED + raw if version == 4 else heads[length] + raw
        for version, raw, length in prefixes.addresses()
    ]


def _failsafe_key(network: IPNetwork) -> bytes:
    return abi.FAILSAFE_KEY.pack(32 + _mapped_length(network), network.version == 4, mapped(network.network_address))


def _network(packed: bytes, length: int) -> IPNetwork:
    return unmap_network(IPv6Network((packed, length)))


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")

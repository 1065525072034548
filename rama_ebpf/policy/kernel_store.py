"""A policy in the BPF maps that the kernel programs read.

Any process that may open the pins can change it; a lock file keeps writers apart, and every change is in force when
the call returns. Rules of the set in force are changed in place, entry by entry: an entry is replaced as a whole, so a
packet sees the old one or the new one.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

from ..core.address import IPAddress, unmap
from ..kernel import abi, bpf
from ..kernel.gate_maps import GateMaps
from ..kernel.instance import Instance
from .rule import Action, IPNetwork, PolicyError, Rule, SynLimit
from .store import Ban, PolicyStore, Settings, StoredRule

__all__ = ["KernelStore"]

_ZERO: Final = (0).to_bytes(4, "little")
_RULE_DRY_RUN: Final = 1


@dataclass(frozen=True, slots=True)
class _Gate:
    """``struct gate``."""

    revision: int
    active: int
    flags: int
    sets: tuple[bytes, bytes]


def _id(number: int) -> bytes:
    return number.to_bytes(4, "little")


def _mapped(address: IPAddress) -> bytes:
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


class KernelStore(PolicyStore):
    """The store over an instance's pinned maps. Close it when done."""

    kind = "kernel"

    def __init__(self, instance: Instance, maps: GateMaps | None = None) -> None:
        """Open the pins, or use maps that are open already (which stay the caller's).

        Raises FileNotFoundError if the instance is not loaded.
        """
        self._instance = instance
        self._owned = maps is None
        self._maps = GateMaps.open(instance.pin_dir) if maps is None else maps
        self._constant = abi.constants()
        self._max_rules = self._maps.capacity("rules")
        self._hint = 1

    def close(self) -> None:
        """Close the maps if this store opened them."""
        if self._owned:
            self._maps.close()

    def __enter__(self) -> KernelStore:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- the gate ------------------------------------------------------------------------------------------------

    def _gate(self) -> _Gate:
        raw = bpf.map_lookup(self._maps["gate"], _ZERO, abi.GATE.size)
        assert raw is not None  # an array has all its elements
        revision, active, flags, first, second = abi.GATE.unpack(raw)
        return _Gate(revision, active, flags, (first, second))

    def _put_gate(self, gate: _Gate) -> None:
        raw = abi.GATE.pack(gate.revision, gate.active, gate.flags, *gate.sets)
        bpf.map_update(self._maps["gate"], _ZERO, raw)

    def _raise_flag(self, *, gate_flag: int = 0, set_flag: int = 0) -> None:
        """Tell the programs that there is something to look up. Flags are lowered when a set is replaced."""
        gate = self._gate()
        head = list(abi.SET_HEAD.unpack(gate.sets[gate.active]))
        if gate.flags | gate_flag == gate.flags and head[1] | set_flag == head[1]:
            return
        head[1] |= set_flag
        sets = list(gate.sets)
        sets[gate.active] = abi.SET_HEAD.pack(*head)
        self._put_gate(replace(gate, flags=gate.flags | gate_flag, sets=(sets[0], sets[1])))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._instance.policy_lock():
            yield

    def _changed(self) -> int:
        gate = self._gate()
        self._put_gate(replace(gate, revision=gate.revision + 1))
        return gate.revision + 1

    @property
    def revision(self) -> int:
        return self._gate().revision

    def settings(self) -> Settings:
        gate = self._gate()
        action, _, *limits = abi.SET_HEAD.unpack(gate.sets[gate.active])
        return Settings(Action(action) or Action.ALLOW, _limit(*limits[:2]), _limit(*limits[2:]))

    def set_settings(self, settings: Settings) -> None:
        if settings.default not in (Action.ALLOW, Action.DROP, Action.REJECT):
            raise PolicyError(f"default {settings.default.name.lower()}: use allow, drop or reject")
        with self._locked():
            gate = self._gate()
            flags = abi.SET_HEAD.unpack(gate.sets[gate.active])[1]
            sets = list(gate.sets)
            sets[gate.active] = abi.SET_HEAD.pack(
                settings.default, flags, *_packed(settings.per_source), *_packed(settings.overall)
            )
            self._put_gate(replace(gate, revision=gate.revision + 1, sets=(sets[0], sets[1])))

    # -- entries -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _inner(self, kind: str, version: int) -> Iterator[int]:
        """Open a map of the set in force."""
        index = _id(self._gate().active)
        raw = bpf.map_lookup(self._maps[f"{kind}{version}"], index, 4)
        assert raw is not None
        fd = bpf.map_by_id(int.from_bytes(raw, "little"))
        try:
            yield fd
        finally:
            bpf.close(fd)

    @staticmethod
    def _place(network: IPNetwork, scope: int) -> tuple[str, bytes]:
        """Return which map holds a prefix, and its key there."""
        version, packed = network.version, network.network_address.packed
        if network.prefixlen == network.max_prefixlen:
            return "exact", abi.EXACT_KEY[version].pack(scope, 0, packed)
        return "prefix", abi.PREFIX_KEY[version].pack(abi.constants()["SCOPE_BITS"] + network.prefixlen, scope, packed)

    def _entry(self, network: IPNetwork, scope: int) -> tuple[int, ...]:
        kind, key = self._place(network, scope)
        with self._inner(kind, network.version) as fd:
            raw = bpf.map_lookup(fd, key, abi.ENTRY.size)
        if raw is None:
            return ()
        *ids, length = abi.ENTRY.unpack(raw)
        # A trie answers with the longest prefix, which may be a shorter one than asked for.
        return tuple(filter(None, ids)) if length == network.prefixlen else ()

    def _set_entry(self, network: IPNetwork, scope: int, ids: tuple[int, ...]) -> None:
        kind, key = self._place(network, scope)
        with self._inner(kind, network.version) as fd:
            if not ids:
                bpf.map_delete(fd, key)
                return
            padded = (*ids, 0, 0, 0)[: self._constant["MAX_CANDIDATES"]]
            try:
                bpf.map_update(fd, key, abi.ENTRY.pack(*padded, network.prefixlen))
            except OSError as error:
                if error.errno not in (errno.E2BIG, errno.ENOSPC, errno.ENOMEM):
                    raise
                what = "addresses" if kind == "exact" else "prefixes"
                option = "--max-addresses" if kind == "exact" else "--max-prefixes"
                size = bpf.map_info(fd).max_entries
                raise PolicyError(
                    f"cannot add {network}: the policy holds its {size} IPv{network.version} {what} already; remove "
                    f"some, or restart with {option} above {size}"
                ) from error
        self._raise_flag(set_flag=self._constant[f"SET_{kind.upper()}{network.version}"])

    def _longest(self, source: IPAddress, scope: int, bits: int) -> tuple[int, tuple[int, ...]] | None:
        version = source.version
        raw = None
        if bits == source.max_prefixlen:
            with self._inner("exact", version) as fd:
                raw = bpf.map_lookup(fd, abi.EXACT_KEY[version].pack(scope, 0, source.packed), abi.ENTRY.size)
        if raw is None:
            key = abi.PREFIX_KEY[version].pack(self._constant["SCOPE_BITS"] + bits, scope, source.packed)
            with self._inner("prefix", version) as fd:
                raw = bpf.map_lookup(fd, key, abi.ENTRY.size)
        if raw is None:
            return None
        *ids, length = abi.ENTRY.unpack(raw)
        return length, tuple(filter(None, ids))

    def _entries(self) -> Iterator[tuple[IPNetwork, int, tuple[int, ...]]]:
        for version, network in ((4, IPv4Network), (6, IPv6Network)):
            for kind, layout in (("exact", abi.EXACT_KEY[version]), ("prefix", abi.PREFIX_KEY[version])):
                with self._inner(kind, version) as fd:
                    rows = bpf.map_lookup_batch(fd, layout.size, abi.ENTRY.size)
                for key, value in rows:
                    fields = layout.unpack(key)
                    scope, packed = (fields[0], fields[2]) if kind == "exact" else (fields[1], fields[2])
                    *ids, length = abi.ENTRY.unpack(value)
                    yield network((packed, length)), scope, tuple(filter(None, ids))

    # -- rules ---------------------------------------------------------------------------------------------------

    def _new_rule(self, rule: Rule, created: int) -> StoredRule:
        rule_id = self._claim(rule, created)
        limit = _packed(rule.limit)
        flags = _RULE_DRY_RUN if rule.dry_run else 0
        hits = bytes(abi.RULE_HITS.size * abi.possible_cpus())
        bpf.map_update(self._maps["rule_hits"], _id(rule_id), hits)
        raw = abi.RULE.pack(rule.action, flags, rule.expires or 0, *limit)
        bpf.map_update(self._maps["rules"], _id(rule_id), raw)
        if rule.expires is not None:
            self._raise_flag(gate_flag=self._constant["GATE_TIMED"])
        stored = self._rule(rule_id)
        assert stored is not None
        return stored

    def _claim(self, rule: Rule, created: int) -> int:
        """Take a free rule id by creating its description; id 0 is the default's."""
        info = abi.RULE_INFO.pack(created, rule.name.encode(), rule.origin.encode(), rule.reason.encode())
        for step in range(self._max_rules - 1):
            rule_id = (self._hint - 1 + step) % (self._max_rules - 1) + 1
            try:
                bpf.map_update(self._maps["rule_info"], _id(rule_id), info, bpf.BPF_NOEXIST)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno not in (errno.E2BIG, errno.ENOSPC):
                    raise
                break
            self._hint = rule_id + 1
            return rule_id
        raise PolicyError(
            f"cannot add rule {rule.name}: the policy holds its {self._max_rules - 1} rules already; remove some, or "
            f"restart with --max-rules above {self._max_rules}"
        )

    def _rule(self, rule_id: int) -> StoredRule | None:
        info = bpf.map_lookup(self._maps["rule_info"], _id(rule_id), abi.RULE_INFO.size)
        return None if info is None else self._stored(rule_id, info)

    def _stored(self, rule_id: int, info: bytes) -> StoredRule | None:
        raw = bpf.map_lookup(self._maps["rules"], _id(rule_id), abi.RULE.size)
        assert raw is not None
        action, flags, expires, emission, tolerance = abi.RULE.unpack(raw)
        if action == Action.NONE:
            return None  # being made by another process
        created, name, origin, reason = abi.RULE_INFO.unpack(info)
        return StoredRule(
            rule_id,
            _text(name),
            Action(action),
            expires or None,
            bool(flags & _RULE_DRY_RUN),
            _limit(emission, tolerance),
            _text(reason),
            _text(origin),
            created,
        )

    def _rules(self) -> list[StoredRule]:
        rows = bpf.map_lookup_batch(self._maps["rule_info"], 4, abi.RULE_INFO.size)
        stored = (self._stored(int.from_bytes(key, "little"), info) for key, info in rows)
        return [rule for rule in stored if rule is not None]

    def _drop_rule(self, rule_id: int) -> None:
        bpf.map_update(self._maps["rules"], _id(rule_id), bytes(abi.RULE.size))
        bpf.map_delete(self._maps["rule_info"], _id(rule_id))
        self._hint = min(self._hint, rule_id)

    def _hits(self, rule_id: int) -> tuple[int, int]:
        raw = bpf.map_lookup(self._maps["rule_hits"], _id(rule_id), abi.RULE_HITS.size * abi.possible_cpus())
        assert raw is not None
        rows = list(abi.RULE_HITS.iter_unpack(raw))
        return sum(row[0] for row in rows), sum(row[1] for row in rows)

    def default_hits(self) -> int:
        """How many connection attempts no rule decided."""
        return self._hits(0)[0]

    # -- bans ----------------------------------------------------------------------------------------------------

    def _ban(self, address: IPAddress) -> Ban | None:
        raw = bpf.map_lookup(self._maps["bans"], _mapped(address), abi.BAN.size)
        return None if raw is None else _ban(address, raw)

    def _set_ban(self, ban: Ban) -> None:
        raw = abi.BAN.pack(ban.expires or 0, ban.created, 0, ban.action, 0, ban.reason.encode()[:63])
        try:
            bpf.map_update(self._maps["bans"], _mapped(ban.address), raw)
        except OSError as error:
            if error.errno not in (errno.E2BIG, errno.ENOSPC):
                raise
            size = self._maps.capacity("bans")
            raise PolicyError(
                f"cannot ban {ban.address}: {size} addresses are banned already; lift some, or restart with --max-bans "
                f"above {size}"
            ) from error
        flag = self._constant["GATE_BANS"]
        self._raise_flag(gate_flag=flag | self._constant["GATE_TIMED"] if ban.expires else flag)

    def _drop_ban(self, address: IPAddress) -> bool:
        return bpf.map_delete(self._maps["bans"], _mapped(address))

    def bans(self) -> list[Ban]:
        rows = bpf.map_lookup_batch(self._maps["bans"], 16, abi.BAN.size)
        return [_ban(unmap(ip_address(key)), raw) for key, raw in rows]

    # -- failsafe ------------------------------------------------------------------------------------------------

    def _in_failsafe(self, source: IPAddress) -> bool:
        key = abi.FAILSAFE_KEY.pack(128, _mapped(source))
        return bpf.map_lookup(self._maps["failsafe"], key, 4) is not None

    def failsafe(self) -> list[IPNetwork]:
        found: list[IPNetwork] = []
        for key, _ in bpf.map_lookup_batch(self._maps["failsafe"], abi.FAILSAFE_KEY.size, 4):
            length, packed = abi.FAILSAFE_KEY.unpack(key)
            address = IPv6Address(packed)
            if address.ipv4_mapped is not None and length >= 96:
                found.append(IPv4Network((address.ipv4_mapped, length - 96)))
            else:
                found.append(IPv6Network((address, length)))
        return found

    def set_failsafe(self, networks: list[IPNetwork]) -> None:
        with self._locked():
            wanted = {
                abi.FAILSAFE_KEY.pack(network.prefixlen + (96 if network.version == 4 else 0), _mapped(address))
                for network in networks
                for address in (network.network_address,)
            }
            if wanted:
                self._raise_flag(gate_flag=self._constant["GATE_FAILSAFE"])
            for key in wanted:
                bpf.map_update(self._maps["failsafe"], key, _id(1))
            for key, _ in bpf.map_lookup_batch(self._maps["failsafe"], abi.FAILSAFE_KEY.size, 4):
                if key not in wanted:
                    bpf.map_delete(self._maps["failsafe"], key)
            self._changed()

    # -- counters ------------------------------------------------------------------------------------------------

    def totals(self) -> dict[tuple[str, str, str], int]:
        """Return how many verdicts took effect by (hook, stage, action), in lower case; zero counts are left out."""
        constant = self._constant
        totals: dict[tuple[str, str, str], int] = {}
        for hook in ("CGROUP", "LOOKUP", "XDP"):
            for stage in ("FAILSAFE", "BAN", "RULE", "LIMIT", "DEFAULT", "PARSE"):
                for action in ("ALLOW", "DROP", "REJECT"):
                    index = constant[f"HOOK_{hook}"] * constant["STAGE_COUNT"] + constant[f"STAGE_{stage}"]
                    index = index * constant["ACTION_COUNT"] + constant[f"ACTION_{action}"]
                    value = self._total("gate_stats", index)
                    if value:
                        totals[hook.lower(), stage.lower(), action.lower()] = value
        return totals

    def established(self, listener: int) -> int:
        """How many handshakes finished on a listener, by its index."""
        return self._total("established", listener)

    def accepted(self, listener: int) -> int:
        """How many connections accept(2) returned on a listener, by its index, over all workers."""
        per_listener = self._constant["SOCKETS_PER_LISTENER"]
        total = 0
        for index in range(listener * per_listener, (listener + 1) * per_listener):
            raw = bpf.map_lookup(self._maps["accepted"], _id(index), 8)
            assert raw is not None
            total += int.from_bytes(raw, "little")
        return total

    def _total(self, name: str, index: int) -> int:
        raw = bpf.map_lookup(self._maps[name], _id(index), 8 * abi.possible_cpus())
        assert raw is not None
        return sum(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))


def _ban(address: IPAddress, raw: bytes) -> Ban:
    expires, created, hits, action, _, reason = abi.BAN.unpack(raw)
    return Ban(address, Action(action), expires or None, created, hits, _text(reason))


def _packed(limit: SynLimit | None) -> tuple[int, int]:
    return (0, 0) if limit is None else (limit.emission_ns, limit.tolerance_ns)


def _limit(emission: int, tolerance: int) -> SynLimit | None:
    return None if not emission else SynLimit(1e9 / emission, tolerance // emission + 1)

"""A policy in the BPF maps that the kernel programs read.

Any process that may open the pins can change it; a lock file keeps writers apart, and every change is in force when
the call returns. A runtime entry is replaced as a whole, so a packet sees the old rule or the new one. Sets are in
:mod:`.kernel_sets`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv6Network, ip_address
from typing import Final

from ..core.address import IPAddress, mapped, unmap
from ..kernel import abi, bpf
from ..kernel.gate_maps import GateMaps
from ..kernel.instance import Instance
from .compiler import MAPPED
from .counters import GateCounters, number
from .kernel_sets import KernelSets, packed_limit, unpacked_limit
from .prefixes import IPNetwork, unmap_network
from .rule import Action, Ban, PolicyError, Rule
from .stored import StoredRule

__all__ = ["KernelStore"]

_FULL: Final = (errno.E2BIG, errno.ENOSPC, errno.ENOMEM)


def _mapped_length(network: IPNetwork) -> int:
    return network.prefixlen + MAPPED[network.version]


def _network(packed: bytes, length: int) -> IPNetwork:
    return unmap_network(IPv6Network((packed, length)))


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


class KernelStore(KernelSets, GateCounters):
    """The store over an instance's pinned maps. Close it when done."""

    kind = "kernel"

    def __init__(self, instance: Instance, maps: GateMaps | None = None) -> None:
        """Open the pins, or use maps that are open already (which stay the caller's).

        Raises FileNotFoundError if the instance is not loaded.
        """
        self._instance = instance
        self._owned = maps is None
        super().__init__(GateMaps.open(instance.pin_dir) if maps is None else maps)
        self._max_rules = self._maps.capacity("rules")
        # Where to look for a free rule id first: starting at 1, each process would walk past those of all the others.
        self._hint = random.randrange(1, self._max_rules)
        self.remember_in(instance.state_dir)

    def close(self) -> None:
        """Have what was noted reach the disk, and close the maps if this store opened them."""
        self.sync()
        if self._owned:
            self._maps.close()

    def __enter__(self) -> KernelStore:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._instance.policy_lock():
            yield

    # -- the runtime layer ---------------------------------------------------------------------------------------

    @staticmethod
    def _runtime_key(network: IPNetwork, port: int) -> bytes:
        return abi.RUNTIME_KEY.pack(_mapped_length(network), port, mapped(network.network_address))

    def _runtime(self, network: IPNetwork, port: int) -> int | None:
        raw = bpf.map_lookup(self._maps["runtime"], self._runtime_key(network, port), 4)
        return None if raw is None else int.from_bytes(raw, sys.byteorder)

    def _set_runtime(self, network: IPNetwork, port: int, rule_id: int) -> None:
        key = self._runtime_key(network, port)
        new = self._runtime(network, port) is None
        if new:
            lengths = self._runtime_lengths(network.version)
            if len(lengths) >= self._constant["MAX_RUNTIME_LENGTHS"] and network.prefixlen not in lengths:
                raise PolicyError(
                    f"cannot add {network}: rules at run time have {len(lengths)} different prefix lengths already; "
                    f"use one of those, or load a set (policy load)"
                )
            self._count_length(network, 1)  # first: the programs look only for lengths that are there
        if port:
            self._flag("GATE_RUNTIME_PORTS")
        try:
            bpf.map_update(self._maps["runtime"], key, number(rule_id))
        except OSError as error:
            if new:
                self._count_length(network, -1)
            if error.errno not in _FULL:
                raise
            raise self._too_many(str(network)) from error

    def _drop_runtime(self, network: IPNetwork, port: int) -> None:
        if bpf.map_delete(self._maps["runtime"], self._runtime_key(network, port)):
            self._count_length(network, -1)

    def _count_length(self, network: IPNetwork, change: int) -> None:
        index = network.prefixlen + (0 if network.version == 4 else 33)
        raw = bpf.map_lookup(self._maps["runtime_lengths"], number(index), 4)
        assert raw is not None
        before = int.from_bytes(raw, sys.byteorder)
        after = max(0, before + change)
        bpf.map_update(self._maps["runtime_lengths"], number(index), number(after))
        if bool(before) == bool(after):
            return
        gate = self._gate()
        bits = gate.runtime[network.version == 6] ^ 1 << _mapped_length(network)
        self._put_gate(
            replace(gate, runtime=(bits, gate.runtime[1]) if network.version == 4 else (gate.runtime[0], bits))
        )

    def _runtime_lengths(self, version: int) -> Sequence[int]:
        bits = self._gate().runtime[version == 6] >> MAPPED[version]
        return [length for length in range(bits.bit_length() - 1, -1, -1) if bits >> length & 1]

    def _runtime_entries(self) -> list[tuple[IPNetwork, int, int]]:
        rows = []
        for key, value in bpf.map_lookup_batch(self._maps["runtime"], abi.RUNTIME_KEY.size, 4):
            length, port, packed = abi.RUNTIME_KEY.unpack(key)
            rows.append((_network(packed, length), port, int.from_bytes(value, sys.byteorder)))
        return rows

    # -- rules ---------------------------------------------------------------------------------------------------

    def _new_rule(self, rule: Rule, created: int, keep: Collection[int] = ()) -> int:
        rule_id = self._claim(rule, created, keep)
        hits = bytes(abi.RULE_HITS.size * abi.possible_cpus())
        bpf.map_update(self._maps["rule_hits"], number(rule_id), hits)
        certain = rule.port is None and rule.expires is None and not rule.dry_run
        flags = self._constant["RULE_DRY_RUN"] * rule.dry_run | self._constant["RULE_CERTAIN"] * certain
        fields = (rule.action, flags, rule.expires or 0, *packed_limit(rule.limit), rule.port or 0, rule.order, 0)
        bpf.map_update(self._maps["rules"], number(rule_id), abi.RULE.pack(*fields))
        return rule_id

    def _claim(self, rule: Rule, created: int, keep: Collection[int]) -> int:
        """Take a free rule id by creating its description; id 0 is the default's."""
        info = abi.RULE_INFO.pack(created, rule.name.encode(), rule.origin.encode(), rule.reason.encode())
        for freed in (False, True):
            for rule_id in itertools.chain(range(self._hint, self._max_rules), range(1, self._hint)):
                try:
                    bpf.map_update(self._maps["rule_info"], number(rule_id), info, bpf.BPF_NOEXIST)
                except FileExistsError:
                    continue
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    break
                self._hint = rule_id + 1
                return rule_id
            if freed or not self._free_rules(keep):
                break
        raise self._too_many(f"rule {rule.name}")

    def _too_many(self, what: str) -> PolicyError:
        limit = self._max_rules - 1
        return PolicyError(
            f"cannot add {what}: the policy holds its {limit} rules already; remove some, load many sources as one "
            f"rule (policy load), or restart with --max-rules above {self._max_rules}"
        )

    def _rule(self, rule_id: int) -> StoredRule | None:
        info = bpf.map_lookup(self._maps["rule_info"], number(rule_id), abi.RULE_INFO.size)
        raw = bpf.map_lookup(self._maps["rules"], number(rule_id), abi.RULE.size)
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
            bool(flags & self._constant["RULE_DRY_RUN"]),
            unpacked_limit(emission, tolerance),
            _text(reason),
            _text(origin),
            created,
            order,
        )

    def _free_rules(self, keep: Collection[int] = ()) -> int:
        used = {rule_id for _, _, rule_id in self._runtime_entries()}
        used.update(keep)
        used.update(self._ids_of_both_sets())
        known = bpf.map_lookup_batch(self._maps["rule_info"], 4, abi.RULE_INFO.size)
        unused = {int.from_bytes(key, sys.byteorder) for key, _ in known} - used
        if unused:
            self._wait_for_programs()  # one may have found the rule's id just before it was taken away
            for rule_id in unused:
                bpf.map_update(self._maps["rules"], number(rule_id), bytes(abi.RULE.size))
                bpf.map_delete(self._maps["rule_info"], number(rule_id))
            self._hint = min(self._hint, *unused)
        return len(unused)

    def _hits(self, rule_id: int) -> tuple[int, int]:
        raw = bpf.map_lookup(self._maps["rule_hits"], number(rule_id), abi.RULE_HITS.size * abi.possible_cpus())
        assert raw is not None
        rows = list(abi.RULE_HITS.iter_unpack(raw))
        return sum(row[0] for row in rows), sum(row[1] for row in rows)

    # -- bans ----------------------------------------------------------------------------------------------------

    def _ban(self, address: IPAddress) -> Ban | None:
        raw = bpf.map_lookup(self._maps["bans"], mapped(address), abi.BAN.size)
        return None if raw is None else _ban(address, raw)

    def _set_ban(self, ban: Ban) -> None:
        raw = abi.BAN.pack(ban.expires or 0, ban.created, ban.hits, ban.action, 0, ban.reason.encode()[:63])
        try:
            bpf.map_update(self._maps["bans"], mapped(ban.address), raw)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            size = self._maps.capacity("bans")
            raise PolicyError(
                f"cannot ban {ban.address}: {size} addresses are banned already; lift some, or restart with --max-bans "
                f"above {size}"
            ) from error
        self._flag("GATE_BANS")

    def _drop_ban(self, address: IPAddress) -> bool:
        return bpf.map_delete(self._maps["bans"], mapped(address))

    def _drop_expired_bans(self, now: int) -> int:
        expired = 0
        for key, raw in bpf.map_lookup_batch(self._maps["bans"], 16, abi.BAN.size):
            expires = int.from_bytes(raw[:8], sys.byteorder)
            if expires and now >= expires:
                expired += bpf.map_delete(self._maps["bans"], key)
        return expired

    def bans(self) -> list[Ban]:
        rows = bpf.map_lookup_batch(self._maps["bans"], 16, abi.BAN.size)
        return [_ban(unmap(ip_address(key)), raw) for key, raw in rows]

    # -- failsafe ------------------------------------------------------------------------------------------------

    def _in_failsafe(self, source: IPAddress, port: int) -> bool:
        if port in self._gate().failsafe_ports:
            return True
        key = abi.FAILSAFE_KEY.pack(32 + 128, source.version == 4, mapped(source))
        return bpf.map_lookup(self._maps["failsafe"], key, 4) is not None

    def failsafe(self) -> list[IPNetwork]:
        rows = bpf.map_lookup_batch(self._maps["failsafe"], abi.FAILSAFE_KEY.size, 4)
        keys = [abi.FAILSAFE_KEY.unpack(key) for key, _ in rows]
        return [_network(packed, length - 32) for length, _, packed in keys]

    def _set_failsafe(self, networks: Sequence[IPNetwork], ports: Sequence[int]) -> int:
        most = self._constant["MAX_FAILSAFE_PORTS"]
        if len(ports) > most:
            raise PolicyError(f"{len(ports)} failsafe ports: use at most {most}")
        wanted = {
            abi.FAILSAFE_KEY.pack(32 + _mapped_length(net), net.version == 4, mapped(net.network_address))
            for net in map(unmap_network, networks)
        }
        if wanted or ports:
            self._flag("GATE_FAILSAFE")
        for key in wanted:
            bpf.map_update(self._maps["failsafe"], key, number(1))
        for key, _ in bpf.map_lookup_batch(self._maps["failsafe"], abi.FAILSAFE_KEY.size, 4):
            if key not in wanted:
                bpf.map_delete(self._maps["failsafe"], key)
        gate = self._gate()
        self._put_gate(replace(gate, revision=gate.revision + 1, failsafe_ports=tuple(ports)))
        return gate.revision + 1

    def sweep(self, *, now: int | None = None) -> int:
        freed = super().sweep(now=now)
        with self._locked():
            gate = self._gate()
            flags = 0
            if any(port for _, port, _ in self._runtime_entries()):
                flags |= self._constant["GATE_RUNTIME_PORTS"]
            if bpf.map_next_key(self._maps["bans"], None, 16) is not None:
                flags |= self._constant["GATE_BANS"]
            if gate.failsafe_ports or bpf.map_next_key(self._maps["failsafe"], None, abi.FAILSAFE_KEY.size):
                flags |= self._constant["GATE_FAILSAFE"]
            if flags != gate.flags:
                self._put_gate(replace(gate, flags=flags))
        return freed


def _ban(address: IPAddress, raw: bytes) -> Ban:
    expires, created, hits, action, _, reason = abi.BAN.unpack(raw)
    return Ban(address, Action(action), expires or None, created, hits, _text(reason))

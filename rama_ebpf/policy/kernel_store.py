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
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv6Network, ip_address
from typing import Final

from ..core.address import IPAddress, mapped, unmap
from ..kernel import abi, bpf
from ..kernel.gate_maps import MAX_FAILSAFE, GateMaps
from ..kernel.instance import Instance
from .compiler import MAPPED, compile_rules
from .counters import GateCounters, number
from .kernel_sets import KernelSets, packed_limit, unpacked_limit
from .prefixes import IPNetwork, unmap_network
from .rule import Action, Ban, PolicyError, Rule, boottime_ns
from .stored import StoredRule

__all__ = ["KernelStore"]

_FULL: Final = (errno.E2BIG, errno.ENOSPC, errno.ENOMEM)
_CROWDED: Final = 64
"""Where so many ids in a row are taken, or there are few, the rules are counted; else there is room."""
_FEW: Final = 4096
_SERVER_PATIENCE: Final = 5.0
_COMMAND_PATIENCE: Final = 30.0
"""Seconds to wait for others that change the policy."""


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
        self._holder: int | None = None  # the thread that has the lock
        super().__init__(GateMaps.open(instance.pin_dir) if maps is None else maps)
        self._max_rules = self._maps.sizes.rules
        self._ids = self._maps.capacity("rules")
        # Where to look for a free rule id first: starting at 1, each process would walk past those of all the others.
        self._hint = random.randrange(1, self._ids)
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
        if self._holder == threading.get_ident():
            yield
            return
        with self._instance.policy_lock(_COMMAND_PATIENCE if self._owned else _SERVER_PATIENCE):
            if self._owned and not self.is_current():
                self._reopen()
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def is_current(self) -> bool:
        """Whether the pins are those that this store has open: a server that starts or stops replaces them."""
        return all(self._is_pinned(name, fd) for name, fd in self._maps.items())

    def _is_pinned(self, name: str, fd: int) -> bool:
        try:
            pinned = bpf.obj_get(str(self._instance.pin_dir / name))
        except OSError:
            return False
        try:
            return bpf.map_info(pinned).id == bpf.map_info(fd).id
        finally:
            bpf.close(pinned)

    def _reopen(self) -> None:
        """Open the pins anew. Raises :class:`PolicyError` if there are none any more."""
        try:
            maps = GateMaps.open(self._instance.pin_dir)
        except FileNotFoundError as error:
            raise PolicyError(f"the policy of instance {self._instance.name!r} was unloaded meanwhile") from error
        self._maps.close()
        self._maps, self._read = maps, None
        self._max_rules, self._ids = maps.sizes.rules, maps.capacity("rules")
        self._hint = random.randrange(1, self._ids)

    # -- the runtime layer ---------------------------------------------------------------------------------------

    @staticmethod
    def _runtime_key(network: IPNetwork, port: int) -> bytes:
        return abi.RUNTIME_KEY.pack(_mapped_length(network), port, mapped(network.network_address))

    def _runtime(self, network: IPNetwork, port: int) -> int | None:
        raw = bpf.map_lookup(self._maps["runtime"], self._runtime_key(network, port), 4)
        return None if raw is None else int.from_bytes(raw, sys.byteorder)

    def _set_runtime(self, network: IPNetwork, port: int, rule_id: int) -> None:
        key = self._runtime_key(network, port)
        self._announce(network, port)
        for reclaimed in (False, True):
            try:
                bpf.map_update(self._maps["runtime"], key, number(rule_id))
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if reclaimed or not self._reclaim((rule_id,)):
                    raise self._too_many(str(network)) from error
            else:
                return

    def _drop_runtime(self, network: IPNetwork, port: int) -> None:
        # That its length may be gone is found out by _rebuild: until then one look-up more finds nothing.
        bpf.map_delete(self._maps["runtime"], self._runtime_key(network, port))

    # What the programs are told of the entries (lengths, flags) is put into force before the first entry that needs it,
    # and taken back only from a count of all entries: whenever a writer is killed, the programs look for too much.

    def _announce(self, network: IPNetwork, port: int) -> None:
        lengths = self._runtime_lengths(network.version)
        if len(lengths) >= self._constant["MAX_RUNTIME_LENGTHS"] and network.prefixlen not in lengths:
            self._rebuild()
            lengths = self._runtime_lengths(network.version)
            if len(lengths) >= self._constant["MAX_RUNTIME_LENGTHS"]:
                raise PolicyError(
                    f"cannot add {network}: rules at run time have {len(lengths)} different prefix lengths already; "
                    f"use one of those, or load a set (policy load)"
                )
        gate = self._gate()
        runtime, flags = _with_length(gate.runtime, network), gate.flags
        if port:
            flags |= self._constant["GATE_RUNTIME_PORTS"]
        if (runtime, flags) != (gate.runtime, gate.flags):
            self._put_gate(replace(gate, runtime=runtime, flags=flags))

    def _rebuild(self) -> None:
        runtime, flags = (0, 0), 0
        for network, port, _ in self._runtime_entries():
            runtime = _with_length(runtime, network)
            if port:
                flags |= self._constant["GATE_RUNTIME_PORTS"]
        gate = self._gate()
        if bpf.map_next_key(self._maps["bans"], None, 16) is not None:
            flags |= self._constant["GATE_BANS"]
        if gate.failsafe_ports or bpf.map_next_key(self._maps["failsafe"], None, abi.FAILSAFE_KEY.size):
            flags |= self._constant["GATE_FAILSAFE"]
        if (runtime, flags) != (gate.runtime, gate.flags):
            self._put_gate(replace(gate, runtime=runtime, flags=flags))

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

    def _new_rule(self, rule: Rule, created: int, keep: Collection[int] = (), *, replaces: bool = False) -> int:
        rule_id, crowded = self._claim(rule, created, keep)
        if not replaces and (crowded or self._ids <= _FEW) and not self._has_room((*keep, rule_id)):
            bpf.map_delete(self._maps["rule_info"], number(rule_id))
            raise self._too_many(f"rule {rule.name}")
        hits = bytes(abi.RULE_HITS.size * abi.possible_cpus())
        bpf.map_update(self._maps["rule_hits"], number(rule_id), hits)
        certain = rule.port is None and rule.expires is None and not rule.dry_run
        flags = self._constant["RULE_DRY_RUN"] * rule.dry_run | self._constant["RULE_CERTAIN"] * certain
        fields = (rule.action, flags, rule.expires or 0, *packed_limit(rule.limit), rule.port or 0, rule.order, 0)
        bpf.map_update(self._maps["rules"], number(rule_id), abi.RULE.pack(*fields))
        return rule_id

    def _claim(self, rule: Rule, created: int, keep: Collection[int]) -> tuple[int, bool]:
        """Take a free rule id by creating its description; id 0 is the default's.

        Return whether many ids were found taken, too."""
        info = abi.RULE_INFO.pack(created, rule.name.encode(), rule.origin.encode(), rule.reason.encode())
        for freed in (False, True):
            ids = itertools.chain(range(self._hint, self._ids), range(1, self._hint))
            for tries, rule_id in enumerate(ids):
                try:
                    bpf.map_update(self._maps["rule_info"], number(rule_id), info, bpf.BPF_NOEXIST)
                except FileExistsError:
                    continue
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    break
                self._hint = rule_id + 1
                return rule_id, tries >= _CROWDED
            if freed or not self._reclaim(keep):
                break
        raise self._too_many(f"rule {rule.name}")

    def _has_room(self, keep: Collection[int]) -> bool:
        """Whether there are no more rules than there may be; what has ended makes room."""
        return self._count_rules() < self._max_rules or (
            self._reclaim(keep) > 0 and self._count_rules() < self._max_rules
        )

    def _count_rules(self) -> int:
        return len(bpf.map_lookup_batch(self._maps["rule_info"], 4, abi.RULE_INFO.size))

    def _check_size(self, rules: int) -> None:
        now = boottime_ns()
        runtime = sum(not self._has_ended(rule_id, now) for _, _, rule_id in self._runtime_entries())
        if runtime + rules >= self._max_rules:
            beside = f" beside the {runtime} at run time" if runtime else ""
            raise PolicyError(
                f"a set of {rules} rules{beside} does not fit: the policy holds {self._max_rules - 1} rules; restart "
                f"with --max-rules above {self._max_rules}"
            )

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

    def take_over(self, other: KernelStore) -> None:
        """Copy another store's whole policy, for maps of another size; its counters are not copied.

        Nobody else knows our maps yet, and the caller holds the lock. Raises :class:`PolicyError` for what does not
        fit, or while a set is on trial.
        """
        if other.pending is not None:
            raise PolicyError("a set is on trial: confirm it, roll it back, or wait until it is undone")
        ruleset, created = other.ruleset(), time.time_ns()
        compiled = compile_rules(ruleset)
        self._set_failsafe(other.failsafe(), other._gate().failsafe_ports)
        runtime = [(network, port, other._rule(rule_id)) for network, port, rule_id in other._runtime_entries()]
        if len(ruleset.rules) + len(runtime) >= self._max_rules:
            raise PolicyError(f"{len(ruleset.rules) + len(runtime)} rules do not fit: raise --max-rules")
        ids: list[int] = []
        for rule in ruleset.rules:
            ids.append(self._new_rule(rule, created, ids, replaces=True))
        self._install(compiled, ids, None)
        for network, port, stored in runtime:
            if stored is not None:
                self._set_runtime(network, port, self._new_rule(stored.rule(network), stored.created, replaces=True))
        for ban in other.bans():
            self._set_ban(ban)
        self._put_gate(replace(self._gate(), revision=other.revision + 1))

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
        text = ban.reason.encode()[:63]
        raw = abi.BAN.pack(ban.expires or 0, ban.created, ban.hits, ban.action, ban.automatic, text)
        self._flag("GATE_BANS")  # first: see _announce
        try:
            try:
                bpf.map_update(self._maps["bans"], mapped(ban.address), raw)
            except OSError as error:
                if error.errno not in _FULL or not self._drop_expired_bans(boottime_ns()):
                    raise
                bpf.map_update(self._maps["bans"], mapped(ban.address), raw)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            size = self._maps.capacity("bans")
            raise PolicyError(
                f"cannot ban {ban.address}: {size} addresses are banned already; lift some, or restart with --max-bans "
                f"above {size}"
            ) from error

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
        if len(wanted) > MAX_FAILSAFE:
            raise PolicyError(f"{len(wanted)} failsafe networks: use at most {MAX_FAILSAFE}")
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


def _with_length(runtime: tuple[int, int], network: IPNetwork) -> tuple[int, int]:
    bit = 1 << _mapped_length(network)
    return (runtime[0] | bit, runtime[1]) if network.version == 4 else (runtime[0], runtime[1] | bit)


def _ban(address: IPAddress, raw: bytes) -> Ban:
    expires, created, hits, action, automatic, reason = abi.BAN.unpack(raw)
    return Ban(address, Action(action), expires or None, created, hits, _text(reason), bool(automatic))

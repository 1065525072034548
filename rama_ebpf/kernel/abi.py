"""What the kernel programs and userspace share: the constants of ``bpf/policy.h`` and the layouts of its structures.

Both are read from the header itself, so there is one place to change them. Here it is said only in which order this
code packs the members of a structure: with a header that has another, nothing of this can be imported.
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Final

from .header import Header

__all__ = [
    "BAN",
    "BAN_ACCOUNT",
    "BAN_KEY",
    "BAN_MASK",
    "BINDING_KEY",
    "BUCKET_KEY",
    "CHAIN_ITEM",
    "CLIENT",
    "CLIENT_KEY",
    "EVENT",
    "EVENT_METER",
    "FAILSAFE_KEY",
    "GATE",
    "GRANT_KEY",
    "GUARDED_KEY",
    "INTERFACE",
    "LIMIT",
    "LISTENER",
    "LISTENER_KEY",
    "PACKET",
    "PEER_KEY",
    "PORT_KEY",
    "QUESTION",
    "REJECT_METER",
    "RULE",
    "RULE_HITS",
    "RULE_INFO",
    "RUNTIME_KEY",
    "SCRATCH",
    "SET_HEAD",
    "SLOT",
    "TABLE",
    "TESTIMONY",
    "TESTIMONY_HEAD",
    "constants",
    "possible_cpus",
    "source_dir",
]


def source_dir() -> Path:
    """Return the directory of the C sources; in a checkout it is a link to ``bpf/``."""
    return Path(__file__).resolve().parent.parent / "_bpf"


_HEADER: Final = Header.read(source_dir() / "policy.h")

LISTENER_KEY: Final = _HEADER.layout("listener_key", "addr", "port", "pad")
LISTENER: Final = _HEADER.layout("listener", "id", "sockets", "state")
BINDING_KEY: Final = _HEADER.layout("binding_key", "plen", "ipv4", "addr")
PORT_KEY: Final = _HEADER.layout("port_key", "plen", "table", "port", "pad")
RULE: Final = _HEADER.layout("rule", "action", "flags", "expires", "emission", "tolerance", "port", "order", "pad")
SLOT: Final = _HEADER.layout("slot", "first", "count")
CHAIN_ITEM: Final = _HEADER.layout("chain_item", "rule", "length", "end")
RUNTIME_KEY: Final = _HEADER.layout("runtime_key", "length", "port", "prefix")
TABLE: Final = _HEADER.layout("table", "base", "shift", "slots", "page", "below", "above", "layout", "zero", "pad")
SET_HEAD: Final = _HEADER.layout(
    "set_head",
    "default_action",
    "chain_items",
    "per_source",
    "global",
    "tables",
    "document_at",
    "document_size",
    "checksum",
)
FAILSAFE_KEY: Final = _HEADER.layout("failsafe_key", "plen", "ipv4", "addr")
PEER_KEY: Final = _HEADER.layout("peer_key", "socket", "addr", "port", "pad")
GRANT_KEY: Final = _HEADER.layout("grant_key", "cgroup", "addr", "port", "pad")
GUARDED_KEY: Final = _HEADER.layout("guarded_key", "namespace", "addr", "port", "pad")
BAN_KEY: Final = _HEADER.layout("ban_key", "prefix", "length")
BAN_MASK: Final = _HEADER.layout("ban_mask", "mask", "length")
BAN: Final = _HEADER.layout("ban", "expires", "created", "hits", "action", "automatic", "reason")
GATE: Final = _HEADER.layout(
    "gate",
    "revision",
    "deadline",
    "active",
    "fallback",
    "flags",
    "failsafe_ports",
    "source_lengths",
    "failsafe_list",
    "pad",
    "owner",
    "runtime",
    "sets",
    "bans",
    "seal",
)
BUCKET_KEY: Final = _HEADER.layout("bucket_key", "rule", "pad", "source")
EVENT: Final = _HEADER.layout(
    "event", "time", "source", "rule", "dry_rule", "port", "hook", "action", "stage", "dry_action", "pad"
)
EVENT_METER: Final = _HEADER.layout("event_meter", "arrival", "lost")
LIMIT: Final = _HEADER.layout("limit", "emission", "tolerance")
CLIENT_KEY: Final = _HEADER.layout("client_key", "source", "port", "pad")
CLIENT: Final = _HEADER.layout(
    "client", "let_in", "let_in_last", "denied", "denied_last", "rule", "stage", "action", "hook", "pad"
)
RULE_HITS: Final = _HEADER.layout("rule_hits", "decided", "dry")
PACKET: Final = _HEADER.layout(
    "packet", "source", "target", "port", "ipv4", "syn", "source_port", "network", "transport", "pad"
)
REJECT_METER: Final = _HEADER.layout("reject_meter", "limit", "arrival")
INTERFACE: Final = _HEADER.layout("interface", "hardware", "answers")
SCRATCH: Final = _HEADER.layout(
    "scratch",
    "packet",
    "wildcard",
    "high",
    "low",
    "loaded",
    "runtime",
    "word",
    "next",
    "last",
    "key",
    "base",
    "verdict",
    "due",
    "listener",
    "answer",
    "size",
    "tcp",
    "ban",
)
TESTIMONY_HEAD: Final = _HEADER.layout("testimony_head", "next", "pad")
QUESTION: Final = _HEADER.layout("question", "source", "target", "port", "pad", "nonce", "unused")
TESTIMONY: Final = _HEADER.layout(
    "testimony", "nonce", "listener", "verdict", "loaded_rank", "loaded_rule", "runtime_rank", "runtime_rule"
)

# Read and written by userspace alone (the map rule_info): created (wall clock, ns), name, origin, reason.
RULE_INFO: Final = struct.Struct("=Q64s32s120s")
# And the map ban_account: revision of the bans, how many of them services made.
BAN_ACCOUNT: Final = struct.Struct("=QQ")


def constants() -> dict[str, int]:
    """Return every enumeration constant of ``policy.h`` by its name."""
    return _HEADER.constants


@functools.cache
def possible_cpus() -> int:
    """Return how many CPUs are possible: a per-CPU value read by userspace has that many slots."""
    count = 0
    for part in Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count

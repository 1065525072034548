"""What the kernel programs and userspace share: the constants of ``bpf/policy.h`` and the layouts of its structures.

The constants are read from the header itself, so there is one place to change them. The layouts are
:class:`struct.Struct` objects; the header asserts the same sizes at compile time, and a test compares the two.
"""

from __future__ import annotations

import functools
import re
import struct
from pathlib import Path
from typing import Final

__all__ = [
    "BAN",
    "BUCKET_KEY",
    "CHAIN_ITEM",
    "EVENT",
    "EVENT_METER",
    "FAILSAFE_KEY",
    "GATE",
    "INTERFACE",
    "LIMIT",
    "LISTENER",
    "LISTENER_KEY",
    "PACKET",
    "PEER_KEY",
    "REJECT_METER",
    "RULE",
    "RULE_HITS",
    "RULE_INFO",
    "RUNTIME_KEY",
    "SCRATCH",
    "SET_HEAD",
    "SLOT",
    "TABLE",
    "constants",
    "possible_cpus",
    "source_dir",
]

LISTENER_KEY: Final = struct.Struct("=16sHH")
LISTENER: Final = struct.Struct("=HHI")
RULE: Final = struct.Struct("=IIQQQHHI")
SLOT: Final = struct.Struct("=II")
CHAIN_ITEM: Final = struct.Struct("=IHH")
RUNTIME_KEY: Final = struct.Struct("=HH16s")
TABLE: Final = struct.Struct("=QIIIIIIII")
SET_HEAD: Final = struct.Struct("=II QQ QQ 40s40s II")
FAILSAFE_KEY: Final = struct.Struct("=II16s")
PEER_KEY: Final = struct.Struct("=Q16sH6x")
BAN: Final = struct.Struct("=QQQII64s")
GATE: Final = struct.Struct("=QQ III 8H I 3Q 3Q 128s128s")
BUCKET_KEY: Final = struct.Struct("=II8s")
EVENT: Final = struct.Struct("=Q16sIIHBBBBH")
EVENT_METER: Final = struct.Struct("=QQ")
LIMIT: Final = struct.Struct("=QQ")
RULE_HITS: Final = struct.Struct("=QQ")
PACKET: Final = struct.Struct("=16s16sHBBHHHH")
REJECT_METER: Final = struct.Struct("=QQQ")
INTERFACE: Final = struct.Struct("=6sH")
SCRATCH: Final = struct.Struct("=44s I QQ 6I 6I 3Q 20s I 5I 4x 32s 8s 16s I 60s")

# Read and written by userspace alone (the map rule_info): created (wall clock, ns), name, origin, reason.
RULE_INFO: Final = struct.Struct("=Q64s32s120s")


def source_dir() -> Path:
    """Return the directory of the C sources; in a checkout it is a link to ``bpf/``."""
    return Path(__file__).resolve().parent.parent / "_bpf"


@functools.cache
def constants() -> dict[str, int]:
    """Return every enumeration constant of ``policy.h`` by its name."""
    text = re.sub(r"/\*.*?\*/", "", (source_dir() / "policy.h").read_text(encoding="utf-8"), flags=re.S)
    found: dict[str, int] = {}
    for body in re.findall(r"enum\s+\w+\s*\{(.*?)\}", text, flags=re.S):
        for name, value in re.findall(r"(\w+)\s*=\s*(0x[0-9a-fA-F]+|\d+)", body):
            found[name] = int(value, 0)
    return found


@functools.cache
def possible_cpus() -> int:
    """Return how many CPUs are possible: a per-CPU value read by userspace has that many slots."""
    count = 0
    for part in Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count

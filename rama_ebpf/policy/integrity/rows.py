"""The rows of rules in the kernel's maps, as bytes: read by the thousand."""

from __future__ import annotations

from typing import Final

from ...kernel import abi, bpf
from ...kernel.gate_maps import GateMaps

__all__ = ["MAPPED_IPV4", "RuleRows"]

MAPPED_IPV4: Final = b"\0" * 10 + b"\xff\xff"


class RuleRows:
    """For one thread at a time. Each returns None where there is nothing."""

    def __init__(self, maps: GateMaps) -> None:
        self.place: Final = bpf.MapReader(maps["runtime"], abi.RUNTIME_KEY.size, 4)
        """A rule's id, by ``struct runtime_key``."""
        self.row: Final = bpf.MapReader(maps["rules"], 4, abi.RULE.size)
        """``struct rule``, by id."""
        self.info: Final = bpf.MapReader(maps["rule_info"], 4, abi.RULE_INFO.size)
        """What only userspace reads, by id."""

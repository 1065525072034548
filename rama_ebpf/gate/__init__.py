"""The kernel's gate from Python: block, allow, ban, watch, load, and put listeners of other programs under the policy.

:class:`Gate` is for asyncio, :class:`SyncGate` for programs without a loop. Both are ``rama_ebpf.Gate`` and
``rama_ebpf.SyncGate``, too.
"""

from .answers import BanEntry, Change, Counters, Decision, Difference, GateEvent, Loaded, RuleEntry
from .asynchronous import Gate
from .errors import GateError, GateFailed, GateRefused, GateUnavailable, GuardRefused
from .events import Events, SyncEvents
from .guard import Guard
from .sync import SyncGate

__all__ = [
    "BanEntry",
    "Change",
    "Counters",
    "Decision",
    "Difference",
    "Events",
    "Gate",
    "GateError",
    "GateEvent",
    "GateFailed",
    "GateRefused",
    "GateUnavailable",
    "Guard",
    "GuardRefused",
    "Loaded",
    "RuleEntry",
    "SyncEvents",
    "SyncGate",
]

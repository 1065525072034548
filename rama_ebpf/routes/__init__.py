"""Which way out a connection takes: ordered routes, ways, groups that choose among ways, and their health.

Nothing here touches a socket, a clock or a loop: callers give the time, and dial (:mod:`rama_ebpf.services.route`).
docs/routes.md has the shape.
"""

from __future__ import annotations

from .blame import FAULTS, Fault, direct_fault, http_fault, socks4_fault, socks5_fault
from .choice import Board, Chooser, LocalBoard, Member
from .health import Health, HealthLimits, State
from .hosts import HostIndex
from .model import (
    RESERVED,
    Chain,
    Choose,
    Direct,
    Group,
    Key,
    Parent,
    PortRange,
    Protocol,
    Refuse,
    Route,
    RouteError,
    Way,
)
from .networks import NetworkIndex
from .table import Decision, Question, RouteTable
from .ways import WayBook

__all__ = [
    "FAULTS",
    "RESERVED",
    "Board",
    "Chain",
    "Choose",
    "Chooser",
    "Decision",
    "Direct",
    "Fault",
    "Group",
    "Health",
    "HealthLimits",
    "HostIndex",
    "Key",
    "LocalBoard",
    "Member",
    "NetworkIndex",
    "Parent",
    "PortRange",
    "Protocol",
    "Question",
    "Refuse",
    "Route",
    "RouteError",
    "RouteTable",
    "State",
    "Way",
    "WayBook",
    "direct_fault",
    "http_fault",
    "socks4_fault",
    "socks5_fault",
]

"""A lab for the tests of users: streams in memory, peers that say and expect, and a real gate in a namespace.

:func:`serve` runs a service or a stack in front of a client in memory, :class:`Targets` stands for what it connects to.
:func:`gate_lab`, which needs root, puts the kernel's gate in front of a real listener. ``docs/lab.md`` shows both.
"""

from .capture import Capture, Segment
from .gate import GateLab, gate_lab
from .memory import MemoryStream, stream_pair
from .network import Host, Lab
from .peer import Peer
from .service import Dialled, Served, Targets, serve

__all__ = [
    "Capture",
    "Dialled",
    "GateLab",
    "Host",
    "Lab",
    "MemoryStream",
    "Peer",
    "Segment",
    "Served",
    "Targets",
    "gate_lab",
    "serve",
    "stream_pair",
]

"""The live tunnels of this process, for ``rama-ebpf flows``, metrics, and whoever has to cut some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from ..core.address import SocketAddress
from .report import CloseReason, TunnelReport

__all__ = ["Flow", "FlowSnapshot", "TunnelRegistry", "tunnels"]


@dataclass(frozen=True, slots=True)
class FlowSnapshot:
    """A live tunnel at one moment: addresses are None for Unix sockets, ``age`` is in seconds, ``user`` "" where nobody
    had to prove one."""

    source: SocketAddress | None
    target: SocketAddress | None
    relay: str
    why: str
    to_upstream: int
    to_client: int
    spills: int
    age: float
    user: str = ""

    def as_json(self) -> dict[str, str | int | float | None]:
        """Return what ``rama-ebpf flows --json`` prints for this flow."""
        return {
            "source": None if self.source is None else str(self.source),
            "target": None if self.target is None else str(self.target),
            "relay": self.relay,
            "why": self.why,
            "to_upstream": self.to_upstream,
            "to_client": self.to_client,
            "spills": self.spills,
            "user": self.user,
            "age": round(self.age, 3),
        }


class Flow(Protocol):
    """A live tunnel as the registry sees it."""

    def snapshot(self) -> FlowSnapshot: ...

    def cut(self) -> None:
        """End the tunnel with RST to both sides; its report says :attr:`CloseReason.CUT`."""


class TunnelRegistry:
    """Every live tunnel, and totals of those that have ended, by relay and close reason."""

    def __init__(self) -> None:
        self._live: set[Flow] = set()
        self.ended: Counter[tuple[str, CloseReason]] = Counter()
        self.bytes: Counter[str] = Counter()
        """Bytes that ended tunnels have moved, both directions together, by relay."""

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[FlowSnapshot]:
        for flow in list(self._live):
            yield flow.snapshot()

    def add(self, flow: Flow) -> None:
        self._live.add(flow)

    def remove(self, flow: Flow, report: TunnelReport) -> None:
        self._live.discard(flow)
        self.ended[report.relay, report.reason] += 1
        self.bytes[report.relay] += report.to_upstream + report.to_client

    def cut(self, which: Callable[[FlowSnapshot], bool]) -> int:
        """Cut every live tunnel for which ``which`` is true; return how many. A new rule cuts what it forbids."""
        chosen = [flow for flow in self._live if which(flow.snapshot())]
        for flow in chosen:
            flow.cut()
        return len(chosen)


tunnels: Final = TunnelRegistry()
"""The registry of this process."""

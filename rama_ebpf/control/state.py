"""What is seen of a server from outside: the file that ``status`` reads, what ``probe`` answers, and whether it is
ready."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ..kernel.denials import DenialCounts
from ..kernel.xdp import XdpAttachment
from ..policy.kernel_store import KernelStore
from ..process import Supervisor
from ..process.sandbox import Sandbox
from .audit import Audit
from .cookies import CookieWatch
from .guard import Guard
from .incumbent import ServedIncumbent
from .kernel_relay import KernelRelay
from .listeners import Listeners
from .options import DaemonOptions
from .policy_host import PolicyHost
from .predecessor import Seniors
from .wire import WireRelay
from .wire_elders import WireElders

__all__ = ["Seen", "ServerState"]

log = logging.getLogger("rama_ebpf")


@dataclass(frozen=True, slots=True)
class Seen:
    """The parts of a server that are asked; ``options`` returns those in force."""

    options: Callable[[], DaemonOptions]
    host: PolicyHost
    supervisor: Supervisor
    incumbent: ServedIncumbent
    seniors: Seniors
    listeners: Listeners
    guard: Guard
    audit: Audit | None
    denials: DenialCounts
    cookies: CookieWatch
    relay: KernelRelay
    wire: WireRelay
    ways: Callable[[], list[dict[str, object]]]
    elders: WireElders


class ServerState:
    """The state of one run."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._is_ready = False
        self._ends_by: float | None = None
        self._stale = ""

    def serves(self) -> None:
        """The start has ended."""
        self._is_ready = True

    def stops(self, limit: float) -> None:
        """The server stops, and is gone in ``limit`` seconds."""
        self._ends_by = time.time() + limit

    def unready(self) -> dict[str, str]:
        """Why the server is not ready, by what; empty if it is."""
        if not self._is_ready:
            return {"start": "it has not ended"}
        if self._ends_by is not None:  # a balancer is to send new clients elsewhere, also while we linger
            return {"stop": "the server stops"}
        audit = self._seen.audit
        return self._seen.guard.problems | ({} if audit is None else audit.problems)

    def write(self) -> None:
        """Write the file anew. A disk that refuses costs nobody but who reads it: it is told once, and the next change
        tries again. While another server serves it is that one's."""
        if not self._seen.incumbent.serves:
            return
        try:
            self._seen.options().instance.write_state(self._described())
        except OSError as error:
            if str(error) != self._stale:
                log.error("what status shows cannot be written: %s", error)
            self._stale = str(error)
        else:
            self._stale = ""

    def guarded(self) -> dict[str, object]:
        """Return what concerns the gate: listeners, XDP, problems."""
        gate = self._seen.host.gate
        return {
            "listeners": self._seen.listeners.described(),
            "xdp": [] if gate is None else [_attached(attached) for attached in gate.xdp],
            "ready": not self.unready(),
            "starting": not self._is_ready,
            "stopping": self._ends_by is not None,
            "problems": self._seen.guard.problems,
            "ways": self._seen.ways(),
            "denials": [
                {"role": role, "call": call, "count": count}
                for (role, call), count in sorted(self._seen.denials.counts().items())
            ],
        }

    def _described(self) -> dict[str, object]:
        seen, gate, store = self._seen, self._seen.host.gate, self._seen.host.store
        counts = seen.supervisor.counts
        since = None if counts.since is None else time.time() - counts.since
        return {
            "pid": os.getpid(),
            "policy": store.kind,
            "maps": store.counters.identity if isinstance(store, KernelStore) else None,
            "witness": None if gate is None else gate.witness.identity,
            "why_local": seen.host.why_local or None,
            "cgroup": str(gate.cgroup) if gate is not None else None,
            "former_cgroups": [] if gate is None else [str(former) for former in gate.attachments.former_cgroups],
            "egress": "services" if gate is None or not gate.guards_workers else "services and kernel",
            "audit": None if seen.audit is None else seen.audit.described(),
            "syn_cookies": seen.cookies.state,
            "sockmap": asdict(seen.relay.status),
            "wire": {**asdict(seen.wire.status), "elders": seen.elders.tunnels},
            "workers": {"expected": counts.expected, "serving": counts.serving, "since": since},
            "sandbox": self._sandbox(),
            "drain": seen.options().drain,
            "ends_by": self._ends_by,
            "draining": [{"pid": senior.pid, "since": senior.since} for senior in seen.seniors.live],
            **self.guarded(),
        }

    def _sandbox(self) -> dict[str, object]:
        """What workers are confined to, by the weakest of those that serve."""
        options = self._seen.options()
        serving = [worker.confinement for worker in self._seen.supervisor.serving]
        return {
            "user": None if options.user is None else options.user.name,
            "wanted": options.sandbox is not Sandbox.OFF,
            "seccomp": bool(serving) and all(confinement.seccomp for confinement in serving),
            "landlock": min((confinement.landlock for confinement in serving), default=0),
        }


def _attached(attached: XdpAttachment) -> dict[str, object]:
    return {
        "interface": attached.interface,
        "mode": attached.mode,
        "why": attached.why or None,
        "why_silent": attached.why_silent or None,
        "link": attached.link_id,
    }

"""What ``rama-ebpf run`` serves, and how: made from the command line or a configuration, and again for a reload."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..core.address import Endpoint, IPAddress
from ..core.client import SourceLengths
from ..kernel import abi
from ..kernel.gate_maps import MapSizes
from ..kernel.instance import Instance
from ..kernel.privileges import UserIds
from ..policy.egress import EgressPolicy
from ..policy.rule import Action, IPNetwork, Rule, SynLimit
from ..process.plan import Json
from ..process.sandbox import Sandbox
from .sockets import ListenAt

__all__ = ["FIXED", "DaemonOptions"]


@dataclass(frozen=True)
class DaemonOptions:
    """What to serve, and how.

    ``target`` is ``module:attribute`` (see :class:`~rama_ebpf.process.Plan`), found with ``directory`` on the module
    path; ``params`` is what it is given. ``default``, ``failsafe`` and ``rules`` are left as they are pinned where
    they are None; ``per_source`` and ``overall`` limit what the default lets in, and go with ``rules``. ``xdp`` are the
    interfaces that get the XDP program; the server does not start if one cannot. With ``syn_cookies`` that program
    sends the stack's cookies. ``rejects`` is how many RST answer ``reject``, None for as many as is usual. ``egress``
    is where workers may connect to, besides port 53 of ``name_servers`` (none: of the host's); ``user`` is who they
    become, None to stay, ``sandbox`` whether they give up files and system calls, and ``read`` and ``write`` are paths
    that are left to them. ``metrics`` is where metrics are served, nowhere if None. ``source_lengths``: whom strikes
    count against, and the bans that follow shut out.
    ``upgrade_drain``: how many seconds live connections have when another server has taken over, None for as many as
    they like; ``max_generations``: how many servers there may be then at once.
    ``record_keep``: for how many seconds the record of who came is kept on disk, None for not at all.
    ``access_log``: a line for each connection. ``sockmap``: load the kernel's relay soon after the start, and not when
    the first tunnel wants it. ``wire``: have the wire relay. ``kill``: a source that the policy comes to deny loses its
    live connections, too.
    """

    instance: Instance
    listen: tuple[ListenAt, ...]
    target: str
    params: Json
    directory: str | None = None
    workers: int = field(default_factory=lambda: min(os.cpu_count() or 1, abi.constants()["SOCKETS_PER_LISTENER"]))
    user: UserIds | None = None
    sandbox: Sandbox = Sandbox.WANTED
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    egress: EgressPolicy = field(default_factory=EgressPolicy)
    name_servers: tuple[IPAddress, ...] = ()
    drain: float = 300.0
    linger: float = 0.0
    watchdog: float = 60.0
    upgrade_drain: float | None = None
    max_generations: int = 4
    default: Action | None = None
    failsafe: tuple[IPNetwork, ...] | None = None
    rules: tuple[Rule, ...] | None = None
    per_source: SynLimit | None = None
    overall: SynLimit | None = None
    sizes: MapSizes = field(default_factory=MapSizes)
    kernel_headers: Path | None = None
    require_kernel: bool = False
    persist: bool = False
    xdp: tuple[str, ...] = ()
    syn_cookies: bool = False
    rejects: SynLimit | None = None
    kill: bool = False
    source_lengths: SourceLengths = field(default_factory=SourceLengths)
    metrics: Endpoint | None = None
    access_log: bool = True
    record_keep: float | None = None
    log_level: str = "info"
    log_format: str = "text"
    sockmap: bool = False
    wire: bool = False


FIXED: Final = (
    "instance",
    "user",
    "sizes",
    "kernel_headers",
    "require_kernel",
    "persist",
    "xdp",
    "syn_cookies",
    "metrics",
)
"""Options that a reload cannot change."""

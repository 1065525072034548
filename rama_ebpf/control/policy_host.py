"""Where the policy lives: in the kernel behind a gate, or in the server process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .. import loader
from ..kernel.compile import CompileError
from ..kernel.gate_maps import GateMaps
from ..kernel.xdp import XdpError
from ..policy.kernel_store import KernelStore
from ..policy.local import LocalStore
from ..policy.store import PolicyStore
from .host_policy import GateUnavailable, HostPolicy
from .options import DaemonOptions
from .succession import Estate

__all__ = ["GateUnavailable", "PolicyHost", "open_policy_host", "refuse_without_gate", "take_over_policy"]

log = logging.getLogger("rama_ebpf")


@dataclass
class PolicyHost:
    """Where the policy lives for this run: in the kernel behind a gate, or in this process."""

    store: PolicyStore
    gate: loader.Gate | None
    why_local: str = ""
    served: bool = False
    """Whether the server has become ready, and what was to be in force is. Before that, nothing that was there when
    it started may go with it."""


@contextlib.contextmanager
def open_policy_host(options: DaemonOptions) -> Iterator[PolicyHost]:
    """Attach the gate, or find out why there is none. When the block ends pins stay as they were found, unless it
    ends well, after it has served, and the options do not keep them: then they go."""
    gate, why = None, ""
    try:
        gate = loader.load(
            options.instance,
            sizes=options.sizes,
            kernel_headers=options.kernel_headers,
            xdp=bool(options.xdp),
            syn_cookies=options.syn_cookies,
            keeper=HostPolicy(options.instance),
        )
        gate.attach()
        if not gate.guards_workers:
            log.warning("cgroups may not be changed here: egress policy is kept by the services alone")
    except (OSError, CompileError) as error:
        why = str(error)
        if gate is not None:
            gate.close(keep_policy=not gate.fresh)
            gate = None
    if gate is not None:
        keep = not gate.fresh
        try:
            _attach_xdp(gate, options.xdp)
            store = KernelStore(options.instance, gate.maps)
            store.rebuild()
            store.keep()
            host = PolicyHost(store, gate)
            try:
                yield host
            except BaseException:
                keep = keep or host.served
                raise
            keep = options.persist if host.served else keep
        finally:
            gate.close(keep_policy=keep)
        return
    if options.instance.pinned:
        # Commands work on those pins, and clients would be judged by another policy than the one they show.
        raise GateUnavailable(
            f"no gate in the kernel: {why}. The policy that is pinned at {options.instance.pin_dir} would not be in "
            "force (rama-ebpf doctor says more; rama-ebpf unload forgets that policy)"
        )
    refuse_without_gate(options, why)
    log.warning(
        "POLICY IS NOT IN THE KERNEL: unwanted clients are turned away only after accept. Reason: %s "
        "(rama-ebpf doctor says more; --require-kernel refuses to run like this)",
        why.splitlines()[0],
    )
    local = LocalStore(max_bans=options.sizes.bans)
    local.remember_in(options.instance.state_dir)
    HostPolicy(options.instance).restore(local)
    local.keep()
    yield PolicyHost(local, None, why)


@contextlib.contextmanager
def take_over_policy(options: DaemonOptions, estate: Estate) -> Iterator[PolicyHost]:
    """Make a gate of our own programs over the maps and links of another server, which it has until
    :attr:`~rama_ebpf.loader.Gate.is_ours`. When the block ends before, all of it is still that server's, else see
    :func:`open_policy_host`."""
    maps = GateMaps.adopt(estate.maps)
    xdp = tuple(dict.fromkeys(options.xdp))
    gate = loader.adopt(
        options.instance, maps, kernel_headers=options.kernel_headers, xdp=bool(xdp), syn_cookies=options.syn_cookies
    )
    estate.take("maps")
    keep = True
    try:
        estate.take("attachments")
        gate.attachments.adopt(estate.attachments, xdp)
        if maps.sizes != options.sizes:
            log.warning("only a restart changes sizes: the maps hold %s", maps.sizes)
        _attach_xdp(gate, [name for name in xdp if name not in gate.attachments.live_xdp])
        host = PolicyHost(KernelStore(options.instance, maps), gate)
        yield host
        keep = options.persist if host.served else keep
    finally:
        gate.close(keep_policy=keep)


def refuse_without_gate(options: DaemonOptions, why: str) -> None:
    """Raise :class:`GateUnavailable` if the operator did not write that it may be served without a gate."""
    if options.require_kernel or options.xdp:
        raise GateUnavailable(f"no gate in the kernel: {why} (rama-ebpf doctor says more)")
    needing = [at for at in options.listen if at.needs_gate and at.endpoint.address is not None]
    if needing:
        names = ", ".join(f"{at.name} ({at.endpoint})" for at in needing)
        raise GateUnavailable(
            f"no gate in the kernel: {why.splitlines()[0]}. Listeners that need it: {names} (rama-ebpf doctor says "
            "more; to serve with "
            'the policy in userspace, after accept, give a listener gate = "optional", or run with --gate optional)'
        )


def _attach_xdp(gate: loader.Gate, interfaces: Iterable[str]) -> None:
    for interface in dict.fromkeys(interfaces):
        try:
            attached = gate.attach_xdp(interface)
        except XdpError as error:
            raise GateUnavailable(str(error)) from error
        if attached.mode == "generic":
            log.warning("XDP on %s is generic, slower: native was refused (%s)", interface, attached.why)
        else:
            log.info("XDP on %s is native", interface)
        if attached.why_silent:
            log.warning("XDP on %s answers nothing, the stack does: %s", interface, attached.why_silent)

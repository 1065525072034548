"""The smallest service that makes a tunnel of a stream, for tests of layers around tunnels."""

from __future__ import annotations

from rama_ebpf.core import Authority
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector, SystemResolver
from rama_ebpf.services.forward import Forward


def tunnel_to(port: int) -> Forward:
    """Relays every stream to one port of this host."""
    return Forward(
        Connector(SystemResolver(threads=1), EgressPolicy.of(["127.0.0.1/32"])), Authority.of("127.0.0.1", port)
    )

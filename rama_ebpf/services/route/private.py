"""What a parent may be asked for: literals are judged as if we dialled them, whatever the parent would say."""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Final

from ...core.address import IPAddress, unmap
from ...core.errors import PolicyDenied
from ...policy.egress import embedded
from ..connect import Egress

__all__ = ["judge_beyond"]

_TRUSTED: Final = frozenset(
    f"egress-default:{name}"
    for name in ("private", "shared-cgnat", "unique-local-metadata", "site-local", "benchmarking", "documentation")
)
"""What a trusted parent's network may be made of. Loopback and metadata addresses are never a target."""
_METADATA: Final = IPv6Address("fd00:ec2::254")


def judge_beyond(egress: Egress, ip: IPAddress, port: int, *, trusted: bool) -> None:
    """Raise :class:`PolicyDenied` if ``ip`` may not be asked for of a parent that is ``trusted`` with its private
    networks, or not."""
    ip = unmap(ip)
    if not trusted:
        egress.check(ip, port)
        return
    for part in (ip, embedded(ip)):
        if part is None:
            continue
        try:
            egress.check(part, port)
        except PolicyDenied as error:
            if error.rule not in _TRUSTED or part == _METADATA:
                raise

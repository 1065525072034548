"""What a policy for sources is asked, and what it answers."""

from __future__ import annotations

from typing import Protocol

from .address import IPAddress

__all__ = ["SourcePolicy", "SourceVerdict"]


class SourceVerdict(Protocol):
    """What a policy says of a source."""

    @property
    def allowed(self) -> bool: ...

    @property
    def rule(self) -> str:
        """The name of the rule that decided."""


class SourcePolicy(Protocol):
    """A policy that can be asked for a source and the port of the listener that it came to.

    In a worker of ``rama-ebpf run`` that is ``context.policy``."""

    async def verdict(self, ip: IPAddress, port: int, /) -> SourceVerdict: ...

"""The server's policy as a worker sees it."""

from __future__ import annotations

import dataclasses

from ..core.address import IPAddress
from ..layers.strikes import StrikeLimit
from ..policy.rule import LONGEST_SECONDS, Action, Stage, Verdict
from .channel import Channel

__all__ = ["ServerPolicy"]


class ServerPolicy:
    """The policy that the supervisor holds, asked over the worker's channel.

    A worker may have no right to the maps in the kernel, and without a kernel there is one policy for all workers
    only there.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def verdict(self, source: IPAddress, port: int, /) -> Verdict:
        """Judge, and count, one connection.

        Raises :class:`~rama_ebpf.core.errors.PeerClosed` if the server has ended.
        """
        answer = await self._channel.request("verdict", {"source": str(source), "port": port})
        return Verdict(Action(int(str(answer["action"]))), Stage(int(str(answer["stage"]))), str(answer["rule"]))

    async def ban(self, source: IPAddress, /, *, ttl: float, reason: str) -> None:
        """Shut out the source that an address belongs to, in the kernel where the gate is; in force when this returns.
        More than ten years are ten years.

        Raises :class:`~.channel.RequestFailed` with the policy's own words, or PeerClosed.
        """
        await self._channel.request("ban", {"source": str(source), "ttl": min(ttl, LONGEST_SECONDS), "reason": reason})

    async def strike(
        self, source: IPAddress, limit: StrikeLimit, /, *, reason: str, spared: IPAddress | None = None
    ) -> None:
        """Count a strike against an address, over all workers; the ban that it may lead to is in force when this
        returns, and does not shut out ``spared``. Raises like :meth:`ban`."""
        body = {"source": str(source), "reason": reason, "spared": None if spared is None else str(spared)}
        limit = dataclasses.replace(limit, ban=min(limit.ban, LONGEST_SECONDS))
        await self._channel.request("strike", body | dataclasses.asdict(limit))

"""The upgrade that relays: the client's stream is joined to an upstream's and the bytes are none of our business."""

from __future__ import annotations

from collections.abc import Callable

from ....core.stream import Stream
from ....relay import Move, TunnelLimits, relay

__all__ = ["Tunnel"]


class Tunnel:
    """An :class:`~..message.model.Upgrade` to a tunnel with ``upstream``; ``limits`` as for
    :func:`rama_ebpf.relay.relay`.

    ``over`` is called once, when the upstream is no longer used.
    """

    def __init__(
        self, upstream: Stream, limits: TunnelLimits | None = None, *, over: Callable[[], None] = lambda: None
    ) -> None:
        self._upstream: Stream | None = upstream
        self._limits = limits
        self._over = over
        self._move: Move | None = None
        self._answer = b""

    def answer_with(self, answer: bytes) -> None:
        """Have :meth:`run` send ``answer`` to the client first: the relay may have to do something before."""
        self._answer = answer

    async def run(self, client: Stream) -> None:
        """Relay until the tunnel ends; both streams are closed then."""
        upstream, self._upstream = self._upstream, None
        assert upstream is not None
        try:
            if self._move is None:
                await relay(client, upstream, self._limits, reply=self._answer)
            else:
                if self._answer:
                    await client.write(self._answer)
                await self._move(client, upstream)
        finally:
            self._over()

    def move_by(self, move: Move) -> None:
        """Have the bytes moved by ``move``: this is a tunnel in a tunnel, and looking into it has been done."""
        self._move = move

    def abandon(self) -> None:
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
            self._over()

"""The server before this one, as this one sees it while it takes over: docs/upgrade.md has the order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Final

from .. import __version__
from ..kernel import abi
from ..kernel.instance import Instance
from ..process import Nursery
from .succession import PROTOCOL, Estate, Senior, ServerChannel, UpgradeFailed, receive_estate

__all__ = ["ENVIRONMENT", "Predecessor", "Seniors"]

log = logging.getLogger("rama_ebpf")

ENVIRONMENT: Final = "RAMA_EBPF_PREDECESSOR"
"""Which descriptor leads to the server that this process is to follow."""
_ANSWER_SECONDS: Final = 30.0


class Predecessor:
    """A server that waits to hand over to this process. ``step`` is what we are about to do, for it to say."""

    def __init__(self, channel: ServerChannel, pid: int) -> None:
        self.channel = channel
        self.pid = pid
        self.step = "configuration"
        self.closed = False
        """Whether none of its workers listens any more."""

    @classmethod
    def of_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Predecessor | None:
        """Return who has started this process to be followed by it, None if nobody has."""
        text = environ.pop(ENVIRONMENT, "")
        if not text.isascii() or not text.isdigit():
            return None
        sock = socket.socket(fileno=int(text))
        sock.set_inheritable(False)
        return cls(ServerChannel(sock), os.getppid())

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell it of an error that ends the block, and pass that on."""
        try:
            yield
        except BaseException as error:
            self.channel.tell(failed=self.step, why=str(error) or type(error).__name__)
            raise

    def at(self, step: str) -> None:
        """Say what we are about to do."""
        self.step = step
        self.channel.tell(step=step)

    def estate(self, instance: Instance) -> Estate:
        """Ask for what it hands over. Raises :class:`~.succession.UpgradeFailed` if that makes no sense, PeerClosed or
        OSError."""
        layout = abi.constants()["LAYOUT_VERSION"]
        self.channel.send(hello=PROTOCOL, version=__version__, layout=layout, instance=instance.name)
        self.step = "hand-over"
        try:
            estate = receive_estate(self.channel, _ANSWER_SECONDS)
        except (LookupError, TypeError, ValueError) as error:
            raise UpgradeFailed(self.step, f"what was handed over makes no sense: {error!r}") from error
        return estate

    def pause(self) -> None:
        """Have it stop to accept, and wait until it has. Raises PeerClosed, TimeoutError or OSError."""
        self.channel.send(switch=True)
        message, _ = self.channel.receive(_ANSWER_SECONDS)
        if "paused" not in message:
            raise UpgradeFailed(self.step, "the server before goes on")

    def follow(self, series: str) -> Senior:
        """Return it as one of the earlier servers that drain."""
        return Senior(self.pid, series, time.time(), self.channel)


class Seniors:
    """The earlier servers that drain still, the oldest first. ``on_change`` is called when one has ended."""

    def __init__(self, nursery: Nursery, on_change: Callable[[], None]) -> None:
        self._nursery = nursery
        self._on_change = on_change
        self._live: list[Senior] = []
        self._ended = asyncio.Event()
        self._ended.set()

    @property
    def live(self) -> tuple[Senior, ...]:
        """Those that have not ended."""
        return tuple(self._live)

    def add(
        self,
        seniors: Iterable[Senior],
        on_closed: Callable[[], None] = lambda: None,
        on_abort: Callable[[], None] = lambda: None,
    ) -> None:
        """Look after more of them. ``on_closed`` is called when one does not listen any more, or has ended, and
        ``on_abort`` when it takes back what it has handed over."""
        for senior in seniors:
            self._live.append(senior)
            self._ended.clear()
            self._nursery.start(f"the care for process {senior.pid}", self._watch(senior, on_closed, on_abort))

    async def _watch(self, senior: Senior, on_closed: Callable[[], None], on_abort: Callable[[], None]) -> None:
        try:
            async with contextlib.aclosing(senior.channel.messages()) as messages:
                async for message in messages:
                    if "closed" in message:
                        on_closed()
                    if "abort" in message:
                        on_abort()
            log.info("the earlier server, process %d, has ended", senior.pid)
            on_closed()
        finally:
            senior.channel.close()
            self._live.remove(senior)
            if not self._live:
                self._ended.set()
            self._on_change()

    def stop(self) -> None:
        """Have all end when their drain's time is over, which begins now."""
        for senior in self._live:
            senior.channel.tell(stop=True)

    def cut(self, senior: Senior) -> None:
        """Have one end now."""
        senior.channel.tell(cut=True)

    async def ended(self) -> None:
        """Wait until all have ended."""
        await self._ended.wait()

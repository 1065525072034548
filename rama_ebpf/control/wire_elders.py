"""Processes that earlier servers have started, and that hold tunnels of the wire relay which outlive these.

A server finds them when it starts, and has its workers adopt what nobody owns any more. They end with their last
tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from ..kernel.holders import entrances, reach
from ..kernel.instance import Instance
from ..process import Nursery
from .wire_words import Word

__all__ = ["WireElders"]

log = logging.getLogger("rama_ebpf")

_MOST: Final = 8
_SILENCE_SECONDS: Final = 10.0
_WORDS_BYTES: Final = 1 << 16


@dataclass(slots=True, eq=False)
class _Elder:
    path: Path
    channel: socket.socket
    tunnels: int = 0
    cgroups: frozenset[int] = frozenset()


class WireElders:
    """Those of ``instance``. ``on_change`` is called when :attr:`tunnels` has changed."""

    def __init__(self, instance: Instance, nursery: Nursery, on_change: Callable[[], None]) -> None:
        self._instance = instance
        self._nursery = nursery
        self._on_change = on_change
        self._live: list[_Elder] = []
        self._doors: list[socket.socket] = []  # open to the end: workers that are replaced get them, too

    @property
    def tunnels(self) -> list[int]:
        """How many tunnels each has, the oldest first."""
        return [elder.tunnels for elder in self._live]

    @property
    def cgroups(self) -> frozenset[int]:
        """The ids of the cgroups to which the sockets of their tunnels belong."""
        return frozenset().union(*(elder.cgroups for elder in self._live))

    @property
    def descriptors(self) -> dict[str, int]:
        """The doors by which workers find them, by names that begin with ``elder-``."""
        return {f"elder-{number}": door.fileno() for number, door in enumerate(self._doors)}

    def meet(self) -> None:
        """Find them. The oldest ones are ended where there are too many."""
        paths = entrances(self._instance)
        for index, path in enumerate(paths):
            try:
                channel = reach(path)
                if channel is None:
                    continue
                self._greet(path, channel, ends=index < len(paths) - _MOST)
            except OSError as error:
                log.error("the process behind %s, which holds tunnels, is not to be reached: %s", path, error)

    def close(self) -> None:
        """Give the doors up."""
        for door in self._doors:
            door.close()

    def _greet(self, path: Path, channel: socket.socket, *, ends: bool) -> None:
        if ends:
            log.warning("more than %d earlier processes hold tunnels: the oldest resets its own, and ends", _MOST)
            with channel:
                channel.send(json.dumps({"end": True}).encode())
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(channel, [json.dumps({"adopt": True}).encode()], [theirs.fileno()])
        channel.setblocking(False)
        self._doors.append(ours)
        elder = _Elder(path, channel)
        self._live.append(elder)
        self._nursery.start("an earlier process that holds tunnels", self._follow(elder))

    async def _follow(self, elder: _Elder) -> None:
        """Listen to it until it has ended."""
        heard, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(elder.channel.fileno(), heard.set)
        try:
            while await self._hear(elder, heard):
                pass
            log.info("an earlier process that held tunnels has ended")
            elder.path.unlink(missing_ok=True)
        except (TimeoutError, OSError, msgspec.DecodeError) as error:
            log.error("an earlier process that holds tunnels is not listened to any more: %s", error or "it is silent")
        finally:
            loop.remove_reader(elder.channel.fileno())
            elder.channel.close()
            self._live.remove(elder)
            self._on_change()

    async def _hear(self, elder: _Elder, heard: asyncio.Event) -> bool:
        async with asyncio.timeout(_SILENCE_SECONDS):
            await heard.wait()
        heard.clear()
        with contextlib.suppress(BlockingIOError):
            while data := elder.channel.recv(_WORDS_BYTES):
                word = msgspec.json.decode(data, type=Word)
                elder.cgroups = frozenset(word.cgroups)
                if word.tunnels != elder.tunnels:
                    elder.tunnels = word.tunnels
                    self._on_change()
            return False
        return True

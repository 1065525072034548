"""The wire relay as the server has it: one child holds it (:mod:`.wire_child`), and is started anew when it ends.

The child is there only where a listener wants the relay. Workers reach it through a socket, the *door*, that outlives
it. What it says has a schema; it is killed when it is silent. If it has tunnels that survive it goes on at the end, for
the next server to find (:mod:`.wire_elders`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from ..core.address import SocketAddress
from ..core.interpreter import module_command
from ..kernel.holders import Entrance
from ..kernel.instance import Instance
from ..kernel.privileges import UserIds
from ..process import Nursery
from ..process.exit_watch import exit_watch
from .kernel_relay import RelayStatus
from .wire_words import Word

__all__ = ["WireRelay"]

log = logging.getLogger("rama_ebpf")

_TUNNELS: Final = 16_384
_SILENCE_SECONDS: Final = 10.0
_START_SECONDS: Final = 320.0
"""The compiler's own bound, and some: under emulation it takes minutes."""
_END_SECONDS: Final = 1.5
_WORDS_BYTES: Final = 1 << 16


class WireRelay:
    """``listeners`` returns the addresses at which clients connect. The child becomes ``user``, and
    ``workers`` share what it has; ``place`` puts it, by its pid, where it can stay when this server has gone, and
    ``cgroups`` are the ids of those to which workers' sockets belong.
    ``on_change`` is called when :attr:`status` has changed."""

    def __init__(
        self,
        instance: Instance,
        nursery: Nursery,
        listeners: Callable[[], Iterable[SocketAddress]],
        *,
        workers: int,
        user: UserIds | None,
        kernel_headers: Path | None,
        on_change: Callable[[], None],
        place: Callable[[int], None] = lambda pid: None,
        cgroups: Callable[[], frozenset[int]] = frozenset,
    ) -> None:
        self._instance = instance
        self._place = place
        self._cgroups = cgroups
        self._nursery = nursery
        self._listeners = listeners
        self._quota = _TUNNELS // workers
        self._user = user
        self._kernel_headers = kernel_headers
        self._on_change = on_change
        self._door: tuple[socket.socket, socket.socket] | None = None
        self._channel: socket.socket | None = None
        self._told: list[tuple[str, int]] = []
        self.status = RelayStatus("unused")
        self.pid: int | None = None
        """Of the child, while there is one."""

    def descriptors(self, *, wanted: bool) -> dict[str, int]:
        """Return what workers need of it, by name; the child is started when it is wanted first."""
        if self._door is None:
            if not wanted:
                return {}
            self._door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._nursery.keep("the wire relay", self._run)
        return {"wire": self._door[0].fileno()}

    def follow_listeners(self) -> None:
        """Tell the child where clients may come from now on."""
        if self._channel is not None and self._places() != self._told:
            self._say({"listeners": self._places(), "cgroups": sorted(self._cgroups())})

    def close(self) -> None:
        """Give the door up."""
        for sock in self._door or ():
            sock.close()

    async def _run(self) -> None:
        """Have the child, until it is refused. Raises RuntimeError when it ends, or is silent."""
        assert self._door is not None
        self._become(RelayStatus("starting"))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        heard = asyncio.Event()
        loop = asyncio.get_running_loop()
        entrance = Entrance(self._instance)
        stays = False
        with ours:
            with theirs:
                process = self._spawn(self._door[1], theirs, entrance.sock)
            self.pid = process.pid
            try:
                self._place(process.pid)
                ours.setblocking(False)
                self._channel = ours
                self._say(
                    {
                        "listeners": self._places(),
                        "cgroups": sorted(self._cgroups()),
                        "count": _TUNNELS,
                        "quota": self._quota,
                        "kernel_headers": None if self._kernel_headers is None else str(self._kernel_headers),
                    }
                )
                loop.add_reader(ours.fileno(), heard.set)
                await self._listen(ours, heard, entrance)
            except asyncio.CancelledError:  # the server stops
                stays = await self._farewell(ours, heard)
                raise
            finally:
                loop.remove_reader(ours.fileno())
                self._channel = self.pid = None
                ours.close()  # it resets all tunnels but those that survive, and ends
                if self.status.state == "ready":
                    self._become(RelayStatus("starting"))
                if stays:
                    process.returncode = 0  # it is no child to wait for any more
                    entrance.close()
                else:
                    try:
                        await _ended(process)
                    finally:
                        entrance.remove()

    async def _farewell(self, ours: socket.socket, heard: asyncio.Event) -> bool:
        """Return whether it goes on without us."""
        self._say({"leave": True})
        with contextlib.suppress(TimeoutError, OSError, msgspec.DecodeError):
            async with asyncio.timeout(_END_SECONDS):
                while True:
                    with contextlib.suppress(BlockingIOError):
                        while data := ours.recv(_WORDS_BYTES):
                            stays = msgspec.json.decode(data, type=Word).stays
                            if stays is not None:
                                return stays > 0
                        return False
                    heard.clear()
                    await heard.wait()
        return False

    async def _listen(self, ours: socket.socket, heard: asyncio.Event, entrance: Entrance) -> None:
        patience = _START_SECONDS
        while True:
            try:
                async with asyncio.timeout(patience):
                    await heard.wait()
            except TimeoutError:
                raise RuntimeError("the process that holds the wire relay is silent") from None
            heard.clear()
            with contextlib.suppress(BlockingIOError):
                while data := ours.recv(_WORDS_BYTES):
                    try:
                        word = msgspec.json.decode(data, type=Word)
                    except msgspec.DecodeError as error:
                        text = f"the process that holds the wire relay breaks its protocol: {error}"
                        raise RuntimeError(text) from error
                    if word.refused:
                        log.warning("the wire relay is not used: %s", word.refused)
                        self._become(RelayStatus("refused", word.refused))
                        return
                    if self.status.state != "ready":
                        patience = _SILENCE_SECONDS
                        entrance.open()
                        log.info("the wire relay is ready")
                        self._become(RelayStatus("ready"))
                raise RuntimeError("the process that holds the wire relay has ended")

    def _spawn(self, door: socket.socket, channel: socket.socket, entrance: socket.socket) -> subprocess.Popen[bytes]:
        user = self._user or UserIds(0, 0)
        fds = door.fileno(), channel.fileno(), entrance.fileno()
        return subprocess.Popen(
            module_command("rama_ebpf.control.wire_child", *map(str, (*fds, user.uid, user.gid))),
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            process_group=0,  # a terminal's Ctrl-C is for us alone
        )

    def _places(self) -> list[tuple[str, int]]:
        return sorted((address.ip.packed.rjust(16, b"\0").hex(), address.port) for address in self._listeners())

    def _say(self, what: dict[str, object]) -> None:
        assert self._channel is not None
        self._told = self._places()
        with contextlib.suppress(OSError):  # it has ended, which is heard; or is silent, which is, too
            self._channel.send(json.dumps(what).encode())

    def _become(self, status: RelayStatus) -> None:
        if status != self.status:
            self.status = status
            self._on_change()


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Let it end, which takes it a moment with many tunnels, or else kill it."""
    exited = asyncio.Event()
    try:
        with contextlib.suppress(TimeoutError, OSError), exit_watch(process.pid, exited.set):
            async with asyncio.timeout(_END_SECONDS):
                await exited.wait()
    finally:
        process.kill()
        process.wait()

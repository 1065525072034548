"""The server after this one: how it is started, given what it goes on with, and watched until it is known to serve.

The walk of an upgrade stands in :meth:`Upgrades._hand_over`; docs/upgrade.md has it in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final, Protocol

from .. import __version__
from ..core.errors import PeerClosed, RamaError
from ..kernel import abi
from ..policy.rule import PolicyError
from ..process import Nursery
from ..process.worker_process import outcome
from .predecessor import ENVIRONMENT
from .succession import PROTOCOL, Estate, ServerChannel, UpgradeFailed, send_estate

__all__ = ["Incumbent", "Upgrades"]

log = logging.getLogger("rama_ebpf")

_START_SECONDS: Final = 120.0
"""How long a new server may take from one step to the next while the old one serves."""
_SWITCH_SECONDS: Final = 15.0
"""How long it may take while nobody is let in."""
_PROBATION_SECONDS: Final = 20.0
"""In which it has to say that it has served for as long as it must."""
_END_SECONDS: Final = 5.0

Json = dict[str, object]


class Incumbent(Protocol):
    """The server that is to be followed: what an upgrade asks of it."""

    @property
    def stopping(self) -> asyncio.Future[None]:
        """Done when it stops, whatever becomes of the upgrade."""

    def refusal(self) -> str:
        """Say why it cannot be followed now; empty if it can."""

    def notice(self) -> str:
        """Say what it will cost; empty if nothing."""

    def held(self) -> contextlib.AbstractAsyncContextManager[object]:
        """Keep its revision as it is."""

    async def stand_by(self) -> None:
        """Touch nothing any more of what is handed over. Raises RamaError."""

    def estate(self) -> Estate:
        """What it hands over: its own, and to be left open."""

    async def pause(self) -> None:
        """Accept what waits and no more, and change nothing of gate, policy and files. Raises RamaError."""

    async def resume(self) -> None:
        """Undo :meth:`stand_by` and :meth:`pause`, and whatever the other server has changed."""

    def yield_to(self, pid: int, channel: ServerChannel) -> None:
        """The other server serves. ``channel`` leads to it."""

    def retire(self, channel: ServerChannel, pid: int) -> None:
        """It will go on to: drain and end."""


class Upgrades:
    """Has other servers follow ``incumbent``, one at a time."""

    def __init__(self, incumbent: Incumbent, nursery: Nursery) -> None:
        self._incumbent = incumbent
        self._nursery = nursery
        self._running: asyncio.Task[None] | None = None
        self._followers: set[asyncio.Queue[Json]] = set()
        self._step = ""

    @property
    def running(self) -> bool:
        """Whether one is under way."""
        return self._running is not None and not self._running.done()

    async def stream(self, _params: Mapping[str, object]) -> AsyncGenerator[Json, None]:
        """Answer ``upgrade``: what happens, and at last whether it has. It goes on if nobody listens any more. Raises
        :class:`~rama_ebpf.policy.rule.PolicyError` if it cannot begin."""
        if self.running:
            raise PolicyError("an upgrade is under way already: wait for its end")
        if why := self._incumbent.refusal():
            raise PolicyError(why)
        queue: asyncio.Queue[Json] = asyncio.Queue()
        self._followers.add(queue)
        self._running = self._nursery.start("the upgrade", self._run())
        try:
            while True:
                line = await queue.get()
                yield line
                if "upgraded" in line:
                    return
        finally:
            self._followers.discard(queue)

    async def end(self) -> None:
        """Wait for the end of the one that is under way: soon, as the server stops."""
        if self._running is not None:
            await asyncio.wait((self._running,))

    def _say(self, text: str, **facts: object) -> None:
        log.info("upgrade: %s", text)
        self._tell({"said": text, **facts})

    def _tell(self, line: Json) -> None:
        for queue in self._followers:
            queue.put_nowait(line)

    async def _run(self) -> None:
        self._step = "start"
        try:
            async with self._incumbent.held():
                pid = await self._hand_over()
        except (RamaError, OSError) as error:
            step = error.step if isinstance(error, UpgradeFailed) else self._step
            text = str(error) if isinstance(error, UpgradeFailed) else f"{step}: {error}"
            log.error("upgrade failed, process %d serves on: %s", os.getpid(), text)
            self._tell({"upgraded": False, "pid": os.getpid(), "step": step, "error": text})
        except BaseException:
            self._tell({"upgraded": False, "pid": os.getpid(), "step": self._step, "error": "see the server's log"})
            raise
        else:
            self._tell({"upgraded": True, "pid": pid, "before": os.getpid()})

    async def _hand_over(self) -> int:
        """Have another server follow; return its process id. Raises RamaError or OSError; then this one serves on."""
        incumbent = self._incumbent
        if notice := incumbent.notice():
            self._say(notice)
        ours, theirs = ServerChannel.pair()
        with contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            with theirs.sock:
                process = self._spawn(theirs.sock.fileno())
            self._say(f"process {process.pid} starts", pid=process.pid)
            other = _Other(process, ours, incumbent.stopping)
            touched = False
            try:
                hello = await other.message(_START_SECONDS, self)
                self._check(hello)
                touched = True
                await incumbent.stand_by()
                estate = incumbent.estate()
                ours.sock.settimeout(_END_SECONDS)
                await asyncio.to_thread(send_estate, ours, estate)
                while "switch" not in (message := await other.message(_START_SECONDS, self)):
                    self._expect(message, "step")
                    self._step = str(message["step"])
                self._step = "switch"
                await incumbent.pause()
                ours.tell(paused=True)
                self._expect(await other.message(_SWITCH_SECONDS, self), "serving")
                incumbent.yield_to(process.pid, ours)
                self._say(f"process {process.pid} serves, process {os.getpid()} stays until it has for a while")
                self._step = "probation"
                with contextlib.suppress(_Stopping):  # then there is no way back
                    self._expect(await other.message(_PROBATION_SECONDS, self), "stable")
            except BaseException:
                ours.tell(abort=True)
                await asyncio.shield(other.end())
                if touched:
                    await incumbent.resume()
                raise
            undo.pop_all()
        incumbent.retire(ours, process.pid)
        return process.pid

    def _spawn(self, fd: int) -> subprocess.Popen[bytes]:
        """The same command line, by the interpreter and the code that are at its place now."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
        return subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            stdin=subprocess.DEVNULL,
            pass_fds=(fd,),
            env=environment | {ENVIRONMENT: str(fd)},
        )

    @staticmethod
    def _expect(message: Mapping[str, Any], what: str) -> None:
        if what not in message:
            raise UpgradeFailed("protocol", f"it says {sorted(message)[:1]} where {what!r} comes next")

    @staticmethod
    def _check(hello: Mapping[str, Any]) -> None:
        """Whether it can go on with what we have. Nothing is touched yet."""
        if hello.get("hello") != PROTOCOL:
            raise UpgradeFailed(
                "version",
                f"version {hello.get('version', 'unknown')} takes over in another way: only a restart leads to it",
            )
        layout = abi.constants()["LAYOUT_VERSION"]
        if hello.get("layout") != layout:
            raise UpgradeFailed(
                "layout",
                f"version {hello.get('version')} has layout {hello.get('layout')} of the policy's maps, and this one, "
                f"{__version__}, has {layout}: only a restart takes the policy from one to the other",
            )

    def step(self) -> str:
        """What the other server was about to do when it was heard last."""
        return self._step


class _Stopping(RamaError):
    kind = "stopping"


class _Other:
    """The process that is to follow."""

    def __init__(
        self, process: subprocess.Popen[bytes], channel: ServerChannel, stopping: asyncio.Future[None]
    ) -> None:
        self._process = process
        self._channel = channel
        self._stopping = stopping

    async def message(self, timeout: float, upgrades: Upgrades) -> Mapping[str, Any]:
        """Return what it says next. Raises :class:`~.succession.UpgradeFailed`, naming the step, or that it has failed,
        ended, or been silent for so many seconds; :class:`_Stopping` if this server stops."""
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        fd = self._channel.sock.fileno()
        loop.add_reader(fd, lambda: None if readable.done() else readable.set_result(None))
        try:
            await asyncio.wait((readable, self._stopping), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(fd)
        if self._stopping.done():
            raise _Stopping("this server stops")
        if not readable.done():
            raise UpgradeFailed(upgrades.step(), f"process {self._process.pid} was silent for {timeout:.0f} s")
        try:
            message, fds = self._channel.receive(wait=False)
        except PeerClosed:
            code = await self.end()
            text = f"process {self._process.pid} ended with {outcome(code)} (its log says why)"
            raise UpgradeFailed(upgrades.step(), text) from None
        except ValueError as error:
            raise UpgradeFailed("protocol", str(error)) from error
        for passed in fds:
            os.close(passed)
        if "failed" in message:
            raise UpgradeFailed(str(message["failed"]), str(message.get("why")))
        return message

    async def end(self) -> int:
        """See to it that it ends, and return how it did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return await asyncio.to_thread(self._process.wait, _END_SECONDS)
        self._process.send_signal(signal.SIGKILL)
        return await asyncio.to_thread(self._process.wait)

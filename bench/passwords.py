"""Users beside guessers: ``python -m bench.passwords [SECONDS]`` (root, two CPUs; 15).

900 attackers from 40 sources log in by SOCKS5 with wrong passwords, each again as soon as it is refused. 5 users from
sources of their own log in with the right ones, 10 times a second each, and have one byte echoed. Shown are the users'
log-ins alone and beside the attackers, without and with strikes: how long they took, how many were refused, the longest
time that a user was refused for, and who of them was banned; and what the attackers got.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from rama_ebpf.layers.auth import hash_password

from .served import COMMAND, served

__all__ = ["Attack", "User", "beside"]

ATTACKERS, SOURCES, USERS = 900, 40, 5
_PORT, _ECHO = 7101, 7102
_PACE = 0.1

_CONFIG = """
[listeners.main]
address = "127.0.0.1:{port}"
stack = "s"
[stacks.s]
service = {{ socks5 = {{ users = "users" }} }}
layers = [{layers}]
[server]
workers = 1
[egress]
allow = ["127.0.0.0/8"]
"""


def _login(user: str, password: str) -> bytes:
    return bytes((1, len(user))) + user.encode() + bytes((len(password),)) + password.encode()


@dataclass
class User:
    """Somebody with the right password, who logs in again and again."""

    name: str
    source: str
    port: int
    target: int
    seconds: list[float] = field(default_factory=list)
    refusals: int = 0
    longest_refused: float = 0.0
    _refused_since: float | None = None

    async def log_in(self) -> bool:
        """Log in, have a byte echoed, leave. Returns whether that was granted."""
        started = time.monotonic()
        granted = False
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(30):
                granted = await self._exchange()
        now = time.monotonic()
        if granted:
            self.seconds.append(now - started)
            self._refused_since = None
            return True
        self.refusals += 1
        self._refused_since = started if self._refused_since is None else self._refused_since
        self.longest_refused = max(self.longest_refused, now - self._refused_since)
        return False

    async def _exchange(self) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(self.source, 0))
        try:
            writer.write(b"\x05\x01\x02")
            if await reader.readexactly(2) != b"\x05\x02":
                return False
            writer.write(_login(self.name, "right"))
            if await reader.readexactly(2) != b"\x01\x00":
                return False
            writer.write(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + self.target.to_bytes(2, "big"))
            if (await reader.readexactly(10))[1] != 0:
                return False
            writer.write(b"x")
            return await reader.readexactly(1) == b"x"
        finally:
            writer.close()

    async def use(self, until: float) -> None:
        """Log in at a pace until then."""
        while time.monotonic() < until:
            await self.log_in()
            await asyncio.sleep(_PACE)


class Attack:
    """Guessers: ``count`` at once from ``sources``. Counts what they are told."""

    def __init__(self, port: int, count: int, sources: int) -> None:
        self.refused = self.granted = self.broken = 0
        self._tasks = [asyncio.create_task(self._guess(port, f"127.0.1.{1 + n % sources}", n)) for n in range(count)]

    async def _guess(self, port: int, source: str, number: int) -> None:
        while True:
            number += 1
            try:
                async with asyncio.timeout(30):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
                    try:
                        writer.write(b"\x05\x01\x02" + _login(f"user{number % 5}", f"guess{number}"))
                        told = await reader.readexactly(4)
                    finally:
                        writer.close()
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                self.broken += 1
                await asyncio.sleep(0.2)
                continue
            self.granted += told[3] == 0
            self.refused += told[3] != 0

    async def stop(self) -> None:
        """End all guessers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def beside(users: list[User], seconds: float, attack: tuple[int, int] | None) -> Attack | None:
    """Let ``users`` log in for a time, beside attackers (how many, from how many sources) if there are to be any."""
    guessers = None if attack is None else Attack(users[0].port, *attack)
    until = time.monotonic() + seconds
    await asyncio.gather(*(user.use(until) for user in users))
    if guessers is not None:
        await guessers.stop()
    return guessers


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1000):
            writer.write(data)
    writer.close()


def _serving(directory: Path, layers: str) -> contextlib.AbstractContextManager[str]:
    users = directory / "users"
    users.write_text("".join(f"user{n}:{hash_password('right')}\n" for n in range(USERS)))
    users.chmod(0o600)
    return served(directory, _CONFIG.format(port=_PORT, layers=layers))


def _banned(instance: str) -> set[str]:
    command = [COMMAND, "bans", "--instance", instance, "--json"]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    return {source for n in range(USERS) if (source := f"127.0.2.{1 + n}") in told.stdout} if told.stdout else set()


def _row(name: str, users: list[User], attack: Attack | None, banned: set[str], alone: float) -> float:
    took = sorted(seconds for user in users for seconds in user.seconds) or [float("nan")]
    p50, p99 = statistics.median(took), took[int(len(took) * 0.99)]
    guesses = "" if attack is None else f"{attack.refused} refused, {attack.broken} kept out, {attack.granted} granted"
    print(
        f"{name:22}{len(took):>8}{p50 * 1000:>9.1f}{p99 * 1000:>9.1f}"
        f"{p99 / (alone or p99):>8.1f}{took[-1] * 1000:>9.1f}"
        f"{sum(user.refusals for user in users):>9}{max(user.longest_refused for user in users):>10.2f}"
        f"{len(banned):>8}  {guesses}",
        flush=True,
    )
    return p99


async def _run(seconds: float) -> None:
    echo = await asyncio.start_server(_echo, "127.0.0.1", _ECHO)
    print(
        f"{'':22}{'log-ins':>8}{'p50 ms':>9}{'p99 ms':>9}{'ratio':>8}{'max ms':>9}{'refused':>9}{'longest s':>10}"
        f"{'banned':>8}  guesses"
    )
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        os.chmod(made, 0o755)
        for name, layers in (("without strikes", ""), ("with strikes", "{ strikes = {} }")):
            with _serving(directory, layers) as instance:
                alone = 0.0
                for attack in (None, (ATTACKERS, SOURCES)):
                    users = [User(f"user{n}", f"127.0.2.{1 + n}", _PORT, _ECHO) for n in range(USERS)]
                    guessers = await beside(users, seconds, attack)
                    banned = await asyncio.to_thread(_banned, instance)
                    title = f"{name}, {'alone' if attack is None else 'attacked'}"
                    alone = _row(title, users, guessers, banned, alone)
    echo.close()


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 15.0
    uvloop.run(_run(seconds))


if __name__ == "__main__":
    main()

"""Checks of passwords are shared fairly, bounded, dropped when nobody waits, and what is proven is remembered."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from rama_ebpf.core import AuthFailed, Busy, Credentials, Lifecycle, Stream, User, shares, stack
from rama_ebpf.core.shares import SourceShare
from rama_ebpf.layers.auth import PasswordFile, PasswordFileError
from rama_ebpf.layers.check_queue import CheckQueue
from rama_ebpf.layers.hashes import choose_cost, hash_password, parse_hash
from rama_ebpf.layers.timeout import TimeoutLayer
from rama_ebpf.process.shared import SharedTable

from .conftest import Serve

CHEAP = (4, 1)


class Held:
    """Checks that end when the test says so, and the order in which they began."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.started = threading.Semaphore(0)
        self.began: list[str] = []

    def check(self, name: str, result: bool = True) -> Callable[[], bool]:
        def run() -> bool:
            self.began.append(name)
            self.started.release()
            assert self.gate.acquire(timeout=30)
            return result

        return run


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.gate.release(100)


async def begun(held: Held) -> None:
    assert await asyncio.to_thread(held.started.acquire, timeout=30)


def _append(path: Path, data: bytes, *, to: bytes | None = None) -> None:
    path.write_bytes((path.read_bytes() if to is None else to) + data)


def _write(path: Path, password: str, *, mark: bytes = b"") -> None:
    path.write_bytes(mark + f"tom:{hash_password(password, CHEAP)}\n".encode())


async def test_sources_take_turns(held: Held) -> None:
    queue = CheckQueue()
    tasks = [asyncio.create_task(queue.run("first", held.check("first")))]
    await begun(held)
    for source in ("greedy", "greedy", "greedy", "modest"):
        tasks.append(asyncio.create_task(queue.run(source, held.check(source))))
    await asyncio.sleep(0)
    held.gate.release(5)
    await asyncio.gather(*tasks)
    assert held.began == ["first", "greedy", "modest", "greedy", "greedy"]


async def test_who_failed_lately_comes_after_those_who_did_not(held: Held) -> None:
    queue = CheckQueue()
    tasks = [asyncio.create_task(queue.run("first", held.check("first")))]
    await begun(held)
    for source in ("guesser", "guesser", "user"):
        tasks.append(asyncio.create_task(queue.run(source, held.check(source))))
    await asyncio.sleep(0)
    queue.failed("guesser")
    held.gate.release(4)
    await asyncio.gather(*tasks)
    assert held.began == ["first", "user", "guesser", "guesser"]


async def test_a_full_queue_is_busy_and_the_greediest_gives_way(held: Held) -> None:
    queue = CheckQueue(total=3, share=SourceShare(shares.Held.CHECKS, 10))
    first = asyncio.create_task(queue.run("first", held.check("first")))
    await begun(held)
    greedy = [asyncio.create_task(queue.run("greedy", held.check("greedy"))) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        await queue.run("greedy", held.check("greedy"))
    modest = asyncio.create_task(queue.run("modest", held.check("modest")))
    with pytest.raises(Busy):
        await greedy[2]
    held.gate.release(4)
    assert await asyncio.gather(first, *greedy[:2], modest) == [True] * 4
    assert (queue.waiting, queue.refused) == (0, 2)


async def test_one_source_has_a_bound(held: Held) -> None:
    queue = CheckQueue(share=SourceShare(shares.Held.CHECKS, 1))
    first = asyncio.create_task(queue.run("a", held.check("a")))
    await begun(held)
    second = asyncio.create_task(queue.run("a", held.check("a")))
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        await queue.run("a", held.check("a"))
    held.gate.release(2)
    assert await asyncio.gather(first, second) == [True, True]


async def test_a_check_that_nobody_waits_for_is_dropped(held: Held) -> None:
    queue = CheckQueue()
    first = asyncio.create_task(queue.run("a", held.check("a")))
    await begun(held)
    gone = asyncio.create_task(queue.run("b", held.check("b")))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    held.gate.release(1)
    await first
    assert (held.began, queue.waiting) == (["a"], 0)


async def test_how_checks_end_is_told(held: Held) -> None:
    told: list[str] = []
    queue = CheckQueue(total=1, observe=told.append)
    held.gate.release(2)
    assert await queue.run("a", held.check("a"))
    assert not await queue.run("a", held.check("a", False))
    await begun(held)
    await begun(held)
    running = asyncio.create_task(queue.run("a", held.check("b")))
    await begun(held)
    waiting = asyncio.create_task(queue.run("b", held.check("c")))
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        await queue.run("b", held.check("d"))
    for left in (running, waiting):
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
    assert told == ["right", "wrong", "busy", "dropped", "dropped"]


async def test_no_time_is_busy_and_no_failure_of_the_client(held: Held) -> None:
    queue = CheckQueue(longest=0.01)
    with pytest.raises(Busy):
        await queue.run("a", held.check("a"))


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    path.write_text(f"tom:{hash_password('secret', CHEAP)}\n")
    return path


async def test_equal_guesses_of_one_source_at_one_moment_are_one(users: Path) -> None:
    file = PasswordFile(users)
    guess = Credentials("tom", "stale", ip_address("192.0.2.1"))
    outcomes = await asyncio.gather(*(file(guess) for _ in range(6)), return_exceptions=True)
    kinds = [outcome.kind for outcome in outcomes if isinstance(outcome, AuthFailed)]
    assert sorted(kinds) == ["auth_failed"] + ["auth_repeated"] * 5


async def test_eighty_users_of_one_address_are_all_let_in(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text("".join(f"u{number}:{hash_password(str(number), CHEAP)}\n" for number in range(80)))
    file = PasswordFile(path)
    source = ip_address("192.0.2.1")
    who = await asyncio.gather(*(file(Credentials(f"u{number}", str(number), source)) for number in range(80)))
    assert who == [User(f"u{number}") for number in range(80)]


@pytest.fixture
def table() -> Iterator[Callable[[int], SharedTable]]:
    fd = SharedTable.create(2)
    yield lambda own: SharedTable(fd, 2, own, bytes(32))
    os.close(fd)


async def test_what_one_worker_has_seen_proven_no_other_checks_again(
    users: Path, table: Callable[[int], SharedTable]
) -> None:
    await PasswordFile(users, proven=table(0).proven())(Credentials("tom", "secret"))

    class Never(CheckQueue):
        async def run(self, source: object, check: Callable[[], bool]) -> bool:
            raise AssertionError("was proven already")

    other = PasswordFile(users, proven=table(1).proven(), queue=Never())
    assert await other(Credentials("tom", "secret")) == User("tom")
    with pytest.raises(AssertionError):
        await other(Credentials("tom", "Secret"))
    _write(users, "new")
    with pytest.raises(AssertionError):
        await other(Credentials("tom", "secret"))


def test_shared_memory_of_proven_passwords_is_bounded_and_expires(table: Callable[[int], SharedTable]) -> None:
    proven = table(0).proven()
    for number in range(40_000):
        proven.add(proven.token(str(number), "", ""), 600)
    last = proven.token("39999", "", "")
    assert proven.holds(last)
    proven.add(last, 0)
    assert not proven.holds(last)


async def test_a_file_that_is_replaced_while_a_check_waits_decides(users: Path) -> None:
    class Replacing(CheckQueue):
        async def run(self, source: object, check: Callable[[], bool]) -> bool:
            if not replaced:
                replaced.append(True)
                _write(users, "another")
            return await super().run(source, check)

    replaced: list[bool] = []
    with pytest.raises(AuthFailed):
        await PasswordFile(users, queue=Replacing())(Credentials("tom", "secret"))


async def test_a_file_that_is_written_again_and_again_holds_no_check_up(users: Path) -> None:
    """What another user's line says by now has nothing to do with this one."""

    class Writing(CheckQueue):
        async def run(self, source: object, check: Callable[[], bool]) -> bool:
            nonlocal checks
            checks += 1
            _append(users, b"# %d\n" % checks)
            return await super().run(source, check)

    checks = 0
    assert await PasswordFile(users, queue=Writing())(Credentials("tom", "secret")) == User("tom")
    assert checks == 1


async def test_a_file_that_is_just_written_costs_no_user_a_refusal(
    users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open(2) and write(2) it is empty; one that stays so has no users."""
    file = PasswordFile(users, queue=CheckQueue())
    _append(users, b"", to=b"")
    assert await file(Credentials("tom", "secret")) == User("tom")
    later = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    with pytest.raises(AuthFailed):
        await file(Credentials("tom", "secret"))


async def test_a_byte_order_mark_is_no_part_of_the_first_name(users: Path) -> None:
    _write(users, "secret", mark=b"\xef\xbb\xbf")
    assert await PasswordFile(users)(Credentials("tom", "secret")) == User("tom")


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "users")
    with pytest.raises(PasswordFileError, match="not a regular file"):
        PasswordFile(tmp_path / "users")


@pytest.mark.root
def test_a_server_that_is_nice_already_checks_passwords_as_well(users: Path) -> None:
    script = (
        "import asyncio, os, sys\n"
        "from rama_ebpf.core import Credentials\n"
        "from rama_ebpf.layers.auth import PasswordFile\n"
        "os.nice(17)\n"
        "file = PasswordFile(sys.argv[1])\n"
        "os.setuid(65534)\n"  # who may not be less nice again
        "print(asyncio.run(file(Credentials('tom', 'secret'))).name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, users], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("tom\n", 0), done.stderr


async def test_argon2_hashes(tmp_path: Path) -> None:
    import argon2

    path = tmp_path / "users"
    path.write_text(f"tom:{argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash('secret')}\n")
    file = PasswordFile(path)
    assert await file(Credentials("tom", "secret")) == User("tom")
    with pytest.raises(AuthFailed):
        await file(Credentials("tom", "wrong"))
    with pytest.raises(ValueError, match="out of range"):
        parse_hash("$argon2id$v=19$m=999999,t=1,p=1$" + "A" * 22 + "$" + "A" * 43)


def test_the_cost_of_a_new_hash_is_measured() -> None:
    assert choose_cost(lambda log_n, p: 0.0) == (17, 1)
    assert choose_cost(lambda log_n, p: 1e-6 * (1 << log_n) * p) == (15, 3)
    assert choose_cost(lambda log_n, p: 9.0) == (13, 1)
    assert hash_password("x", CHEAP).startswith("$scrypt$ln=4,r=8,p=1$")


def test_a_dear_hash_is_pointed_out(users: Path) -> None:
    users.write_text(users.read_text() + "dear:$2b$16$" + "A" * 53 + "\n")
    assert [name for name, _ in PasswordFile(users).dear()] == ["dear"]


async def test_the_handshakes_clock_stands_while_the_client_waits_for_us(serve: Serve) -> None:
    async def slow(stream: Stream) -> str:
        with Lifecycle.of(stream.extensions).owed():
            await asyncio.sleep(0.3)
        return "served"

    server = await serve(stack(TimeoutLayer(0.1), slow))
    await server.open()
    assert await server.outcome() == "served"

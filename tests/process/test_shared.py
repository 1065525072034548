from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from rama_ebpf.core.shares import Held, ShareExceeded, SourceShare
from rama_ebpf.layers.concurrency import ConcurrencyExceeded, ConcurrencyLimitLayer
from rama_ebpf.process import shared
from rama_ebpf.process.shared import SharedTable, TableFull

from .conftest import Client, Start

COLUMNS = 4
SECRET = b"s" * 32


@pytest.fixture
def fd() -> Iterator[int]:
    made = SharedTable.create(COLUMNS)
    yield made
    os.close(made)


def worker(fd: int, column: int) -> SharedTable:
    """The table as another worker maps it. (Record locks are a process's: contention needs real processes.)"""
    return SharedTable(fd, COLUMNS, column, SECRET)


def test_shares_of_one_stack_are_one_and_of_others_apart(fd: int) -> None:
    tables = [worker(fd, column) for column in range(2)]
    source = ip_address("192.0.2.1")

    def shares(table: SharedTable, *stacks: str) -> list[SourceShare]:
        counts = table.counts()
        return [SourceShare(Held.BINDS, 1, counts=counts, label=stack) for stack in stacks]

    # A worker of the configuration before, and one of the next, in which a stack has come before the others.
    before, after = shares(tables[0], "a", "b"), shares(tables[1], "new", "a", "b")
    with before[0].hold(source):
        with pytest.raises(ShareExceeded), after[1].hold(source):
            pass
        with after[0].hold(source), after[2].hold(source):
            pass
    with after[1].hold(source):
        pass


def test_a_limit_is_one_for_all_workers(fd: int) -> None:
    counts = [worker(fd, column).counts() for column in range(3)]
    assert [count.enter("source", 2) for count in counts] == [True, True, False]
    assert counts[2].enter("other source", 2)
    counts[0].leave("source")
    assert counts[2].enter("source", 2)
    assert not counts[0].enter("source", 2)


def test_limits_of_different_layers_are_apart(fd: int) -> None:
    one, two = worker(fd, 0), worker(fd, 1)
    first, second = one.counts(), one.counts()
    assert first.enter("source", 1)
    assert second.enter("source", 1)
    assert not two.counts().enter("source", 1)


def test_a_rate_is_one_for_all_workers(fd: int) -> None:
    buckets = [worker(fd, column).buckets(0.001, 3) for column in range(2)]
    waits = [buckets[index % 2].take("source", 0) for index in range(4)]
    assert waits[:3] == [0.0, 0.0, 0.0]
    assert waits[3] == pytest.approx(1000, rel=0.01)
    assert buckets[0].take("other source", 0) == 0.0


def test_what_may_wait_takes_its_token_now(fd: int) -> None:
    buckets = worker(fd, 0).buckets(10, 1)
    assert buckets.take("source", 60) == 0.0
    assert buckets.take("source", 60) == pytest.approx(0.1, abs=0.09)
    assert buckets.take("source", 60) == pytest.approx(0.2, abs=0.09)


def test_what_a_dead_worker_counted_is_wiped(fd: int) -> None:
    dead, alive = worker(fd, 0).counts(), worker(fd, 1).counts()
    for _ in range(5):
        assert dead.enter("source", 6)
    assert alive.enter("source", 6)
    assert not alive.enter("source", 6)
    SharedTable(fd, COLUMNS, None, SECRET).wipe(0)
    assert [alive.enter("source", 6) for _ in range(6)] == [True] * 5 + [False]


def test_rows_of_sources_that_have_gone_are_used_again(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_ROWS", 64)
    small = SharedTable.create(COLUMNS)
    counts = worker(small, 0).counts()
    for number in range(1000):
        assert counts.enter(number, 1)
        if number >= 64:
            counts.leave(number)
        if number == 63:
            with pytest.raises(TableFull):
                counts.enter("one more", 1)
            counts.leave(0)
    os.close(small)


def _hammer(fd: int, column: int, times: int, limit: int, seen: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    counts = SharedTable(fd, COLUMNS, column, SECRET).counts()
    probe = SharedTable(fd, COLUMNS, None, SECRET)
    row = probe.row(probe.hash_of(1, "source"), lambda row: False)
    held = entered = most = 0
    while entered < times:
        if counts.enter("source", limit):
            held += 1
            entered += 1
            most = max(most, probe.total(row))
        elif held:
            counts.leave("source")
            held -= 1
    for _ in range(held):
        counts.leave("source")
    seen.put(most)


def test_no_race_between_processes_exceeds_the_limit(fd: int) -> None:
    first = SharedTable(fd, COLUMNS, 3, SECRET).counts()
    assert first.enter("source", 1)  # so that the row is there
    context = multiprocessing.get_context("fork")
    seen = context.Queue()
    processes = [context.Process(target=_hammer, args=(fd, column, 5000, 5, seen)) for column in range(3)]
    for process in processes:
        process.start()
    most = [seen.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
    assert max(most) == 5
    first.leave("source")
    assert [first.enter("source", 2) for _ in range(3)] == [True, True, False]


async def test_who_waits_gets_a_place_that_another_process_leaves(fd: int) -> None:
    gate = asyncio.Event()

    async def hold(input: object) -> str:
        await gate.wait()
        return "served"

    one, two = worker(fd, 0), worker(fd, 1)
    first = ConcurrencyLimitLayer(1, wait=30, shared=one)(hold)
    second = ConcurrencyLimitLayer(1, wait=30, shared=two)(hold)
    impatient = ConcurrencyLimitLayer(1, wait=0.1, shared=worker(fd, 2))(hold)
    serving = asyncio.create_task(first(None))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(second(None))
    with pytest.raises(ConcurrencyExceeded):
        await impatient(None)
    gate.set()
    assert await asyncio.gather(serving, waiting) == ["served", "served"]


async def test_a_servers_limit_is_exact_whoever_serves_and_survives_a_workers_death(supervise: Start) -> None:
    server = await supervise("limited", workers=2, params={"limit": 10})

    async def admitted() -> Client | None:
        try:
            client = await server.open()
            await client.ask("who")
        except ConnectionResetError:
            return None
        return client

    clients = [await admitted() for _ in range(30)]
    held = [client for client in clients if client is not None]
    assert len(held) == 10
    pids = [(await client.ask("who"))["pid"] for client in held]
    victim = pids[0]
    os.kill(victim, signal.SIGKILL)
    await server.logged("its replacement starts")
    left = [client for client, pid in zip(held, pids, strict=True) if pid != victim]
    again = [await admitted() for _ in range(20)]
    assert len(left) + sum(client is not None for client in again) == 10

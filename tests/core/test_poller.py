"""The poller: what is told, when, and to whom."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import weakref
from collections.abc import Iterator

import pytest

from rama_ebpf.core.poller import READABLE, SPECIAL, WRITABLE, Poller


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        yield near, far


async def turns() -> None:
    """Let the event loop ask the kernel, twice."""
    for _ in range(4):
        await asyncio.sleep(0.001)


async def test_a_change_is_told_once_and_what_is_there_already_at_once(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    told: list[int] = []
    far.send(b"x")
    poller = Poller.current()
    poller.add(near.fileno(), told.append)
    await turns()
    assert told == [READABLE], "the byte that was there, and nothing of the room to write"
    await turns()
    assert told == [READABLE], "nothing has changed, though the byte was not read"
    far.send(b"y")
    await turns()
    assert told == [READABLE, READABLE]
    far.close()
    await turns()
    assert told[-1] & SPECIAL
    poller.remove(near.fileno())


async def test_room_is_told_from_the_first_wish_on_and_none_is_missed(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    told: list[int] = []
    poller = Poller.current()
    poller.add(near.fileno(), told.append)
    with contextlib.suppress(BlockingIOError):
        while True:
            near.send(b"x" * 65_536)
    with contextlib.suppress(BlockingIOError):
        while True:  # all of it is read before anybody asks
            far.recv(1 << 20)
    await turns()
    assert told == []
    poller.want_writes(near.fileno())
    await turns()
    assert told == [WRITABLE]
    poller.remove(near.fileno())


async def test_the_next_watcher_is_told_what_comes_and_a_removed_socket_nothing(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    first: list[int] = []
    second: list[int] = []
    poller = Poller.current()
    poller.add(near.fileno(), first.append)
    far.send(b"x")
    await turns()
    poller.replace(near.fileno(), second.append)
    await turns()
    assert (first, second) == ([READABLE], [])
    far.send(b"y")
    await turns()
    assert (first, second) == ([READABLE], [READABLE])
    poller.remove(near.fileno())
    far.send(b"z")
    await turns()
    assert (first, second) == ([READABLE], [READABLE])


async def test_a_watcher_that_fails_does_not_take_the_events_of_others_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    told: list[int] = []

    def fail(_events: int) -> None:
        raise ValueError("a bug")

    poller = Poller.current()
    for (near, _), watcher in zip(pairs, (told.append, fail, told.append), strict=True):
        poller.add(near.fileno(), watcher)
    with caplog.at_level(logging.ERROR):
        for _, far in pairs:
            far.send(b"x")
        await turns()
    assert told == [READABLE, READABLE]
    assert "a bug" in caplog.text
    for near, far in pairs:
        poller.remove(near.fileno())
        near.close()
        far.close()


def test_each_loop_has_its_own_and_its_descriptor_goes_with_it() -> None:
    async def make() -> weakref.ref[Poller]:
        assert Poller.current() is Poller.current()
        return weakref.ref(Poller.current())

    gc.collect()  # what earlier tests have left to it has gone before we count
    before = len(os.listdir("/proc/self/fd"))
    pollers = [asyncio.run(make()) for _ in range(3)]
    gc.collect()
    assert [poller() for poller in pollers] == [None, None, None]
    assert len(os.listdir("/proc/self/fd")) == before

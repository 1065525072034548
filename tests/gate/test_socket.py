"""A gate whose policy is in a server: by its control socket, and its events."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from ipaddress import ip_address

import pytest

from rama_ebpf import Gate, SyncGate
from rama_ebpf.control.api import ControlApi
from rama_ebpf.control.events import BACKLOG, Event, EventHub
from rama_ebpf.control.socket import ControlServer
from rama_ebpf.gate import GateRefused, GateUnavailable
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.rule import Action, Stage

ENOUGH = 3 * BACKLOG


class Server:
    """What a server has that holds its policy itself."""

    def __init__(self, instance: str) -> None:
        self.instance = Instance(instance)
        self.store = LocalStore()
        self.watched = asyncio.Event()
        self.hub = EventHub(lambda watched: self.watched.set() if watched else self.watched.clear())
        self.instance.make_run_dir()
        self.socket = ControlServer(
            self.instance.control_socket, ControlApi(self.store).call, {"events": self.hub.stream}
        )

    def publish(self, count: int, rule: str = "default") -> None:
        for n in range(count):
            source = ip_address(0xC6120000 + n)
            self.hub.publish(Event(1e9 + n, source, 1080, rule, Action.DROP, Stage.DEFAULT, "cgroup"))


@pytest.fixture
async def server(instance: str) -> AsyncIterator[Server]:
    made = Server(instance)
    await made.socket.start()
    yield made
    await made.socket.stop()


async def test_changes_reach_the_server_and_many_in_portions(server: Server) -> None:
    async with Gate(server.instance.name) as gate:
        change = await gate.block([f"198.18.{n >> 8}.{n & 255}" for n in range(2500)], reason="many")
        assert (change.sources, change.revision) == (2500, 3)
        assert len(server.store.records()) == 2500
        assert not (await gate.verdict("198.18.9.9")).allowed
        assert (await gate.ban(["192.0.2.7", "192.0.2.8"])).sources == 2
        assert (await gate.unblock([f"198.18.{n >> 8}.{n & 255}" for n in range(2500)])).sources == 2500
        with pytest.raises(GateRefused, match="nothing is changed"):
            await gate.block(["192.0.2.7", "nobody"])
        with pytest.raises(GateRefused, match="counts by rule alone"):
            await gate.counters()


async def test_events_come_as_they_happen_and_their_rule_can_be_chosen(server: Server) -> None:
    async with Gate(server.instance.name) as gate, gate.events() as events, gate.events("scanners") as chosen:
        server.publish(2)
        server.publish(1, "scanners")
        found = [await anext(events) for _ in range(3)]
        assert [event.rule for event in found] == ["default", "default", "scanners"]
        assert (found[0].source, found[0].action, found[0].lost) == (ip_address("198.18.0.0"), "drop", 0)
        assert (await anext(chosen)).rule == "scanners"


async def test_slow_reader_loses_a_counted_number(server: Server) -> None:
    async with Gate(server.instance.name) as gate, gate.events() as events:
        server.publish(ENOUGH)  # at once, and nobody reads: what waits is bounded
        received = lost = 0
        while received + events.lost < ENOUGH:
            event = await anext(events)
            received, lost = received + 1, lost + event.lost
        assert received <= 2 * BACKLOG
        assert events.lost == ENOUGH - received
        server.publish(1, "after")
        while (event := await anext(events)).rule != "after":
            received, lost = received + 1, lost + event.lost
        assert lost + event.lost == events.lost


async def test_events_of_a_thread_without_a_loop_are_bounded_as_well(server: Server) -> None:
    found: list[int] = []

    def read() -> None:
        with SyncGate(server.instance.name) as gate, gate.events() as events:
            ready.set()
            received = 0
            while received + events.lost < ENOUGH:
                next(events)
                received += 1
            found.extend((received, events.lost))

    ready = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    await asyncio.to_thread(ready.wait)
    server.publish(ENOUGH)
    await asyncio.to_thread(reader.join)
    assert sum(found) >= ENOUGH
    assert found[1] >= ENOUGH - 2 * BACKLOG


async def test_end_of_the_server_is_told_with_the_remedy(server: Server) -> None:
    async with Gate(server.instance.name) as gate:
        events = gate.events()
        await events.start()
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        server.publish(1)
        assert (await waiting).port == 1080
        await _end(server)
        with pytest.raises(GateUnavailable, match="start it with rama-ebpf run"):
            await anext(events)
        await events.aclose()
        with pytest.raises(GateUnavailable, match="rama-ebpf run"):
            await gate.block("198.18.0.1")
        with pytest.raises(GateUnavailable, match="rama-ebpf run"):
            await anext(gate.events())


async def _end(server: Server) -> None:
    """As the end of its process does: all its connections are closed."""
    await server.socket.stop()
    others = [task for task in asyncio.all_tasks() if "ControlServer._serve" in repr(task.get_coro())]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def test_one_too_many_that_watch_is_told_so(server: Server) -> None:
    async with Gate(server.instance.name) as gate, contextlib.AsyncExitStack() as watching:
        for _ in range(16):
            await watching.enter_async_context(gate.events())
        with pytest.raises(GateRefused, match="16 are watching already"):
            await anext(gate.events())
        with pytest.raises(TypeError, match="named by text"):
            gate.events(7)  # type: ignore[arg-type]


async def test_iterating_ends_when_the_events_are_closed(server: Server) -> None:
    gate = SyncGate(server.instance.name)
    events = await asyncio.to_thread(gate.events)
    rest = asyncio.create_task(asyncio.to_thread(list, events))
    await asyncio.to_thread(events.close)
    assert await rest == []
    async with Gate(server.instance.name) as other:
        more = other.events()
        await more.start()
        await more.aclose()
        assert [event async for event in more] == []

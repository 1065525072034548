"""Verdicts as they happen: what a watcher is shown, and that it costs the gate nothing when nobody watches."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address
from typing import Any

import pytest

from rama_ebpf.control.events import BACKLOG, MAX_WATCHERS, Event, EventHub, GateEvents
from rama_ebpf.control.socket import follow
from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.bpf import AttachType
from rama_ebpf.kernel.bytecode import Program
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.kernel.ringbuf import RingBuffer
from rama_ebpf.policy.rule import Action, PolicyError, Rule, Stage, parse_network

from ..conftest import StartProxy
from ..lab import Lab, wait_for
from ..policy.frames import ethernet, ipv4, tcp
from ..policy.probe import Probe, listen
from ..proxy import ProxyProcess
from .test_gate import PORT, Scene

SOURCE = IPv4Address("198.18.0.7")
FRAME = ethernet(ipv4(SOURCE, IPv4Address("198.18.0.1"), tcp(PORT)))


@pytest.mark.root
@pytest.mark.ebpf
def test_a_watcher_is_told_who_was_turned_away_where_and_by_which_rule(lab: Lab, start_proxy: StartProxy) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", "--listen", f"[{server.ipv6}]:{PORT}")
    scene = Scene(proxy, server, client)
    with contextlib.closing(follow(Instance(proxy.instance).control_socket, "events", {})) as events:
        assert next(events) == {"watching": True}

        def seen() -> dict[str, Any]:
            event = next(events)["event"]
            assert isinstance(event, dict)
            return event

        scene.greet()
        first = seen()
        assert first.pop("time").startswith("20")
        assert first == {
            "source": client.ipv4,
            "port": PORT,
            "rule": "default",
            "action": "allow",
            "stage": "default",
            "hook": "cgroup",
        }
        proxy.command("block", client.ipv4, "--reject")
        scene.attempt()
        second = seen()
        assert (second["hook"], second["action"], second["rule"]) == ("lookup", "reject", f"reject:{client.ipv4}/32")
        proxy.command("block", client.ipv6, "--dry-run")
        scene.greet(10)
        wait_for(lambda: "dry_run" in seen(), what="the dry run")
        rate = bpf.obj_get(str(Instance(proxy.instance).pin_dir / "event_rate"))
        assert bpf.map_lookup(rate, bytes(4), 16) != bytes(16)
    wait_for(lambda: bpf.map_lookup(rate, bytes(4), 16) == bytes(16), what="the end of the events")
    bpf.close(rate)

    name = f"drop:{client.ipv4}/32"
    proxy.command("block", client.ipv4)
    command = [ProxyProcess.COMMAND, "events", "--instance", proxy.instance, "--rule", name, "--count", "1"]
    for extra in ((), ("--json",)):
        with subprocess.Popen([*command, *extra], stdout=subprocess.PIPE, text=True) as watcher:
            while watcher.poll() is None:
                scene.attempt()
            assert watcher.stdout is not None
            line = watcher.stdout.read()
        assert watcher.returncode == 0
        if extra:
            assert json.loads(line)["rule"] == name
        else:
            assert f" cgroup {client.ipv4} to port {PORT}: drop (rule {name})" in line


@pytest.mark.root
@pytest.mark.ebpf
def test_a_server_that_was_killed_while_somebody_watched_leaves_no_work_to_the_next(probe: Probe) -> None:
    bpf.map_update(probe.maps["event_rate"], bytes(4), abi.LIMIT.pack(1, 1))
    GateEvents(probe.maps, str)
    assert bpf.map_lookup(probe.maps["event_rate"], bytes(4), abi.LIMIT.size) == bytes(abi.LIMIT.size)


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    with (
        Probe(Instance(f"test-{os.getpid()}-events"), None, Program("gate_xdp", 6, AttachType.XDP)) as made,
        listen(made, PORT),
    ):
        made.store.add(Rule("denied", (parse_network(str(SOURCE)),), Action.DROP))
        yield made


def flood(probe: Probe, emission: int, tolerance: int, count: int) -> tuple[list[bytes], int, int]:
    """Drop ``count`` SYNs while events keep to a rate; return the events, those lost, and how long it took in ns."""
    ring = RingBuffer(probe.maps["events"])
    assert ring.read(1) == []
    meters = abi.EVENT_METER.size * abi.possible_cpus()
    bpf.map_update(probe.maps["event_meter"], bytes(4), bytes(meters))
    bpf.map_update(probe.maps["event_rate"], bytes(4), abi.LIMIT.pack(emission, tolerance))
    code, each, _, _ = bpf.prog_test_run(probe.programs["gate_xdp"], FRAME, repeat=count)
    bpf.map_update(probe.maps["event_rate"], bytes(4), bytes(abi.LIMIT.size))
    assert code == 1  # XDP_DROP
    raw = bpf.map_lookup(probe.maps["event_meter"], bytes(4), meters)
    assert raw is not None
    records = list(iter(lambda: ring.read(100), []))
    ring.close()
    return (
        [record for some in records for record in some],
        sum(lost for _, lost in abi.EVENT_METER.iter_unpack(raw)),
        each,
    )


@pytest.mark.root
@pytest.mark.ebpf
def test_no_events_are_made_while_nobody_watches(probe: Probe) -> None:
    assert flood(probe, 0, 0, 1000)[:2] == ([], 0)


@pytest.mark.root
@pytest.mark.ebpf
def test_events_keep_to_their_rate_and_the_rest_is_counted(probe: Probe) -> None:
    hour = 3600 * 10**9
    events, lost, _ = flood(probe, hour, 9 * hour, 20_000)
    assert 10 <= len(events) <= 10 * abi.possible_cpus()  # the run may have moved
    assert len(events) + lost == 20_000
    _, packed, _, _, port, hook, action, stage, _, _ = abi.EVENT.unpack(events[0])
    assert ip_address(packed).ipv4_mapped == SOURCE  # type: ignore[union-attr]
    assert (port, hook, action, stage) == (PORT, 2, Action.DROP, Stage.RULE)


@pytest.mark.root
@pytest.mark.ebpf
def test_events_that_find_the_ring_full_are_counted_and_the_ring_is_read_round_and_round(probe: Probe) -> None:
    for _ in range(3):
        events, lost, _ = flood(probe, 1, 1 << 60, 8000)
        assert len(events) == 256 * 1024 // 48
        assert len(events) + lost == 8000
        assert {len(event) for event in events} == {abi.EVENT.size}


def event(number: int, rule: str = "a") -> Event:
    return Event(float(number), SOURCE, PORT, rule, Action.DROP, Stage.RULE, "xdp")


async def test_a_watcher_that_does_not_keep_up_is_told_how_much_it_lost() -> None:
    changes: list[bool] = []
    hub = EventHub(changes.append)
    slow = hub.stream({})
    assert await anext(slow) == {"watching": True}
    for number in range(BACKLOG + 10):
        hub.publish(event(number))
    for _ in range(BACKLOG):
        assert "event" in await anext(slow)
    assert await anext(slow) == {"lost": 10}
    await slow.aclose()
    assert changes == [True, False]


async def test_a_watcher_sees_the_rule_that_it_asked_for_and_there_are_not_too_many_watchers() -> None:
    hub = EventHub()
    one = hub.stream({"rule": "b"})
    await anext(one)
    hub.publish(event(1, "a"))
    hub.publish(event(2, "b"))
    shown = (await anext(one))["event"]
    assert isinstance(shown, dict)
    assert shown["rule"] == "b"
    others = [hub.stream({}) for _ in range(MAX_WATCHERS)]
    for other in others[:-1]:
        await anext(other)
    with pytest.raises(PolicyError, match="watching already"):
        await anext(others[-1])
    for other in (one, *others):
        await other.aclose()

"""The record of who came: whom the gate let in, whom it turned away, and by what."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.clients import Client, LocalClients
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.local import CountedPolicy, LocalStore
from rama_ebpf.policy.rule import Action, Rule, Stage, parse_network

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from .test_server import PORT, answered


@contextlib.contextmanager
def _store(instance: str) -> Iterator[KernelStore]:
    with KernelStore(Instance(instance)) as store:
        yield store


def _only(store: KernelStore, source: str) -> Client:
    found = store.clients.of(ip_address(source))
    assert len(found) == 1, found
    return found[0]


def _knocks(client: Host, server: str) -> None:
    """Send one SYN that gets no answer."""
    with contextlib.suppress(OSError):
        client.connect(server, PORT, timeout=0.2).close()


@pytest.mark.root
@pytest.mark.ebpf
def test_the_gate_keeps_whom_it_let_in_and_whom_it_turned_away(lab: Lab, start_proxy: StartProxy) -> None:
    server, client, other = lab.host("proxy"), lab.host("client"), lab.host("other")
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", "--listen", f"[{server.ipv6}]:{PORT}")
    before = time.time() - 1
    assert answered(client, server.ipv4)
    assert answered(client, server.ipv4)
    assert answered(client, server.ipv6)
    with _store(proxy.instance) as store:
        found = _only(store, client.ipv4)
        assert (found.port, found.let_in, found.denied, found.was_let_in) == (PORT, 2, 0, True)
        assert before < found.let_in_last < time.time() + 1
        assert _only(store, client.ipv6).let_in == 1

        proxy.command("block", client.ipv4, "--reject")
        _knocks(client, server.ipv4)
        wait_for(lambda: _only(store, client.ipv4).denied >= 1, what="the denial")
        found = _only(store, client.ipv4)
        assert (found.let_in, found.was_let_in, found.stage, found.action) == (2, False, Stage.RULE, Action.REJECT)
        assert (found.rule, found.hook) == (f"reject:{client.ipv4}/32", "lookup")

        proxy.command("ban", other.ipv4)
        _knocks(other, server.ipv4)
        wait_for(lambda: store.clients.of(ip_address(other.ipv4)), what="the denial")
        found = _only(store, other.ipv4)
        assert (found.let_in, found.stage, found.hook) == (0, Stage.BAN, "cgroup")
        assert store.clients.missed() == 0
        assert {row.source for row in store.clients.all()} >= {
            ip_address(client.ipv4),
            ip_address(client.ipv6),
            ip_address(other.ipv4),
        }


def test_without_a_gate_the_policy_in_the_process_keeps_the_same() -> None:
    store = LocalStore(max_entries=16)
    store.add(Rule("no", (parse_network("198.18.0.0/24"),), Action.DROP))
    policy = CountedPolicy(store)
    for source in ("198.18.0.1", "198.18.1.1", "198.18.1.1"):
        policy.verdict(ip_address(source), PORT)
    (denied,) = store.clients.of(ip_address("198.18.0.1"))
    (let_in,) = store.clients.of(ip_address("198.18.1.1"))
    assert (denied.denied, denied.rule, denied.stage, denied.was_let_in) == (1, "no", Stage.RULE, False)
    assert (let_in.let_in, let_in.denied, let_in.was_let_in) == (2, 0, True)


def test_the_oldest_make_room_in_the_record() -> None:
    store = LocalStore(max_entries=16)
    table = LocalClients(most=2)
    for number in (1, 2, 1, 3):
        table.note(store.verdict(ip_address(f"198.18.0.{number}"), PORT), ip_address(f"198.18.0.{number}"), PORT)
    assert [(str(row.source), row.let_in) for row in table.all()] == [("198.18.0.1", 2), ("198.18.0.3", 1)]

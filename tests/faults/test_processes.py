"""Processes that die, stop and end by themselves, under load."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from ..hammer import Denied, Served
from ..lab import wait_for
from ..proxy import has_ended
from .conftest import ALLOWED, DENIED, ROUNDS, TARGET, EchoServer, StartEcho, attached_programs, measured

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(240 if not ROUNDS else 20 + 20 * ROUNDS)]

_STEADY_SECONDS = 11.0
_STEADY_SHARE = 0.95
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGSEGV)


def _strike(server: EchoServer, number: signal.Signals, pid: int) -> None:
    """What must hold: clients are served again by all workers; while one is stopped the others serve."""
    server.proxy.log.clear()
    began = time.monotonic()
    os.kill(pid, number)
    if number == signal.SIGSTOP:
        silent = rf"\(pid {pid}\) does not answer|\(pid {pid}\) ended"
        wait_for(lambda: server.proxy.logged(silent), timeout=20, what="the silence")
        measured("a stopped worker is steered around", began)
        # Connections of before may wait with the worker; new ones do not come to it. On a busy host the other one may
        # be silent for a moment as well.
        wait_for(lambda: all(map(server.served, ALLOWED * 2)), timeout=20, what="a way around the stopped worker")
        if not has_ended(pid):
            os.kill(pid, signal.SIGCONT)
    else:
        wait_for(lambda: has_ended(pid), timeout=20, what=f"the worker's end by {number.name}")
        wait_for(lambda: all(map(server.served, ALLOWED)), timeout=20, what="service")
        measured("clients of a worker that ended are served", began)
    server.wait_until_whole()


class _Victims:
    """Who is struck next: mostly one that has served for long, which is replaced at once; one that ends soon after its
    start is replaced after a pause that grows, and this is tried, too, but not 500 times."""

    def __init__(self, server: EchoServer, chance: random.Random) -> None:
        self._server = server
        self._chance = chance
        self._seen: dict[int, float] = {}

    def next(self) -> int:
        now, workers = time.monotonic(), self._server.proxy.workers()
        self._seen = {pid: self._seen.get(pid, now) for pid in workers}
        steady = [pid for pid in workers if now - self._seen[pid] > _STEADY_SECONDS]
        return self._chance.choice(steady if steady and self._chance.random() < _STEADY_SHARE else workers)


def test_whatever_happens_to_workers_clients_are_served_again_and_denied_ones_never(start_echo: StartEcho) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    print(f"seed {seed}")
    server = start_echo(workers=8 if ROUNDS else 2)
    victims = _Victims(server, chance)
    with Denied(server.host, DENIED, [TARGET]) as denied, Served(server.host, ALLOWED, TARGET) as served:
        for _ in range(ROUNDS or 8):
            wait_for(lambda before=served.served: served.served > before + chance.randrange(20), what="load")
            _strike(server, chance.choice(SIGNALS), victims.next())
        before = served.served
        wait_for(lambda: served.served > before + 20, what="service afterwards")
    assert denied.got_in == []
    server.proxy.signal(signal.SIGTERM)
    assert server.proxy.wait() == 0


def test_when_the_supervisor_dies_nothing_goes_on_and_the_next_run_serves_the_same_policy(
    start_echo: StartEcho,
) -> None:
    chance = random.Random(random.randrange(2**32))
    server = start_echo()
    server.proxy.command("block", "198.18.1.4")
    denied_sources = (*DENIED, "198.18.1.4")
    with Denied(server.host, denied_sources, [TARGET]) as denied, Served(server.host, ALLOWED[:3], TARGET) as served:
        for _ in range((ROUNDS + 4) // 5 or 3):
            wait_for(lambda before=served.served: served.served > before + chance.randrange(20), what="load")
            workers = server.proxy.workers()
            began = time.monotonic()
            server.proxy.signal(chance.choice([signal.SIGKILL, signal.SIGSEGV]))
            wait_for(lambda pids=workers: all(map(has_ended, pids)), what="the end of the workers")
            wait_for(lambda: not attached_programs(server.host), what="the end of the programs")
            measured("nothing is left of a server that was killed", began)
            server.proxy.end()
            server.proxy.start()
            server.wait_until_whole()
    assert denied.got_in == []
    assert served.served


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_server_whose_every_worker_is_lost_at_once_serves_again(
    start_echo: StartEcho, number: signal.Signals
) -> None:
    server = start_echo()
    workers = server.proxy.workers()
    for pid in workers:
        os.kill(pid, number)
    if number == signal.SIGSTOP:
        state = server.instance.read_state
        wait_for(lambda: state()["workers"]["serving"] == 0, timeout=20, what="the silence")  # type: ignore[index]
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    server.wait_until_whole()


def test_a_stopped_supervisor_holds_up_no_client_and_goes_on(start_echo: StartEcho) -> None:
    server = start_echo()
    server.proxy.signal(signal.SIGSTOP)
    assert all(server.served(source) for source in ALLOWED)
    server.proxy.command("block", ALLOWED[3])
    assert not server.served(ALLOWED[3])
    server.proxy.signal(signal.SIGCONT)
    server.wait_until_whole()
    assert server.proxy.logged("does not answer") is False, "workers were blamed for the supervisor's pause"

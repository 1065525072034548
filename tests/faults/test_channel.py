"""A worker that was taken over says whatever it likes on its channel."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import random
import signal
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from rama_ebpf.control.events import EventHub
from rama_ebpf.control.policy_thread import PolicyThread
from rama_ebpf.control.worker_requests import WorkerRequests
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.process import Plan, WorkerProcess

from ..conftest import StartProxy
from ..hammer import echoed
from ..lab import Host, wait_for
from .conftest import ALLOWED, ROUNDS, TARGET

MESSAGES = 1_000_000 if ROUNDS else 10_000

VALID: list[dict[str, object]] = [
    {"topic": "verdict", "body": {"source": "203.0.113.7", "port": 1080}, "id": 1},
    {"topic": "ban", "body": {"source": "203.0.113.7", "ttl": 60, "reason": "x"}, "id": 2},
    {"topic": "strike", "body": {"source": "2001:db8::1", "reason": "x", "strikes": 3, "window": 60, "ban": 60}},
    {"topic": "alive", "body": {}},
    {"id": 7, "answer": {"a": 1}},
    {"id": 7, "error": "no"},
]
ODD: list[object] = [
    *(
        0,
        -1,
        1,
        65536,
        2**31,
        2**53,
        2**63,
        10**30,
        -(10**30),
        1e308,
        0.0,
        -0.0,
        True,
        False,
        None,
        "",
        "x" * 5000,
        "\0",
    ),
    *("\ud800", "inf", "NaN", "203.0.113.7", "::", "1.2.3.4%eth0", "fe80::1%x", "0x7f.1", "::ffff:127.0.0.1", [], {}),
    *([[]] * 5, {"a": {"b": {"c": {"d": {"e": 1}}}}}, ["x"] * 10_000, {"x" * 100: 1}, "\u202e", "203.0.113.7\n"),
]
RAW = [
    *(b"", b"\n", b"{}", b"[]", b"null", b"1e999", b'"', b"\xff\xfe", b"\x00" * 100, b"{" * 100_000, b"[" * 100_000),
    *(
        b'{"topic":"ban","body":{"source":"203.0.113.7","ttl":1e999,"reason":""},"id":1}',
        b'{"topic":',
        b"\xef\xbb\xbf{}",
    ),
    *(b'{"topic":"ban","body":{"source":"203.0.113.7","ttl":NaN,"reason":""},"id":1}', b"9" * 10_000, b"{}" * 1000),
    *(
        b'{"topic":"ban","topic":"alive","id":1,"id":2}',
        b'{"\\u0000":1}',
        b"-",
        b'{"topic":"alive","body":' + b"[" * 5000,
    ),
]


def hostile(chance: random.Random) -> bytes:
    """Return a message, mostly near a valid one."""
    kind = chance.random()
    if kind < 0.15:
        return chance.choice(RAW) + b"\n"
    message = json.loads(json.dumps(chance.choice(VALID)))
    for _ in range(chance.randrange(3)):
        where = message
        if chance.random() < 0.6 and isinstance(message.get("body"), dict):
            where = message["body"]
        name = chance.choice([*where, "topic", "id", "body", "answer", "x"])
        if chance.random() < 0.2:
            where.pop(name, None)
        else:
            where[name] = copy.deepcopy(chance.choice(ODD))
    line = json.dumps(message).encode() + b"\n"
    if kind < 0.3:
        cut = chance.randrange(len(line))
        return line[:cut] + bytes(chance.randrange(256) for _ in range(chance.randrange(4))) + line[cut:]
    return line


def _left(sock: socket.socket, line: bytes) -> bytes:
    """Send what can be sent at once, and return the rest."""
    try:
        return line[sock.send(line) :]
    except BlockingIOError:
        return line
    except ConnectionError:
        return b""  # it was closed, as it should be


async def _swallow(sock: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(sock, 65536):
        pass


@pytest.fixture
def quiet() -> Iterator[None]:
    """A line a message would be a gigabyte of log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(120 if not ROUNDS else 7200)
async def test_no_message_of_a_worker_harms_the_server(quiet: None) -> None:
    """The server's end of a channel, with all that it answers: each channel takes messages until one breaks the schema,
    then another takes the rest. Nothing but the end of the channel may come of it."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    store = LocalStore(max_entries=4096)
    sent, channels = 0, 0
    stranger = ip_address("203.0.113.1")
    process = await asyncio.to_thread(subprocess.Popen, ["true"])
    with PolicyThread() as thread, process:
        requests = WorkerRequests(store, thread, EventHub())
        while sent < MESSAGES:
            channels += 1
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            worker = WorkerProcess(Plan("tests.faults:none", (), 1), 0, "0g0", process, 0)
            requests.started(worker)
            worker.channel.on("alive", lambda body: {})
            await worker.channel.open(ours)
            running = asyncio.ensure_future(worker.channel.run())
            reading = asyncio.ensure_future(_swallow(theirs))
            while not running.done() and sent < MESSAGES:
                line = _left(theirs, hostile(chance))
                if line:
                    sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(theirs, line))
                    done, _ = await asyncio.wait((sending, running), timeout=60, return_when=asyncio.FIRST_COMPLETED)
                    assert done, "nobody reads, and nobody has closed"
                    sending.cancel()
                sent += 1
                await asyncio.sleep(0)
            theirs.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(running, 60)  # what it raises fails the test
            await worker.channel.close()
            reading.cancel()
            await asyncio.wait((reading,))
            theirs.close()
        # All that it did is what messages of the schema may do.
        assert all(ban.expires is not None and ban.automatic for ban in store.bans())
        assert store.verdict(stranger, 1080).action.name == "ALLOW"
        await asyncio.wait_for(thread.run(store.sync), 30)
    print(f"{sent} messages on {channels} channels")


@pytest.mark.root
@pytest.mark.ebpf
def test_a_worker_that_breaks_its_channel_is_replaced_and_costs_nobody_else_anything(
    host: Host, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    listen = f"{TARGET[0]}:{TARGET[1]}"
    proxy = start_proxy(host, "--workers", "2", "--listen", listen, "tests.faults.taken_over:application")
    for _ in range(3):
        before = set(proxy.workers())
        with host.connect(*TARGET, source=ALLOWED[0]) as sock:
            sock.sendall(b"fuzz!")
            wait_for(lambda known=before: set(proxy.workers()) - known, timeout=30, what="a replacement")
        wait_for(
            lambda: len(proxy.workers()) == 2 and proxy.json("status")["workers"]["serving"] == 2,
            timeout=60,
            what="two workers",
        )
        assert not host.call(lambda: echoed(host, ALLOWED[1], TARGET))
    assert not proxy.logged("Traceback"), proxy.log
    proxy.signal(signal.SIGTERM)
    assert proxy.wait() == 0

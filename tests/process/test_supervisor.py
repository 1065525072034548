from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import signal
from pathlib import Path

import pytest

from rama_ebpf.kernel.privileges import UserError, UserIds
from rama_ebpf.process import Listener, Plan
from rama_ebpf.process.plan import PlanError
from rama_ebpf.services.tcp import bind_tcp

from .conftest import Start, Supervised, gone, status


def _descriptors(pid: int) -> list[str]:
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}").split(":")[0])
    return sorted(links)


async def test_every_worker_serves(supervise: Start) -> None:
    server = await supervise(workers=3)
    assert {(await (await server.open_to(worker)).ask("who"))["worker"] for worker in range(3)} == {0, 1, 2}


async def test_each_listener_has_its_own_service(supervise: Start) -> None:
    server = await supervise("two_services", listeners=["echo", "hello"])
    echo, hello = await server.open(0), await server.open(1)
    echo.writer.write(b"ping\n")
    assert await echo.reader.readline() == b"ping\n"
    assert await hello.reader.read() == b"hello\n"


async def test_params_reach_the_application(supervise: Start) -> None:
    params = {"users": ["tom"], "deep": {"ü": 1.5}}
    assert await (await (await supervise(params=params)).open()).ask("params") == params


async def test_workers_and_their_replacements_share_a_secret_that_another_server_does_not_know(
    supervise: Start,
) -> None:
    server, other = await supervise(workers=2), await supervise()
    secrets = [await (await server.open_to(worker)).ask("secret") for worker in (0, 1)]
    os.kill((await server.pids())[0], signal.SIGKILL)
    await server.logged("its replacement starts")
    secrets.append(await (await server.open_to(0)).ask("secret"))
    assert len(set(secrets)) == 1
    assert len(bytes.fromhex(secrets[0])) == 32
    assert await (await other.open()).ask("secret") != secrets[0]


async def test_a_worker_is_unprivileged_and_holds_only_what_it_needs(supervise: Start) -> None:
    server = await supervise(workers=2, user="nobody", listeners=["one", "two"])
    pid = (await server.pids())[0]
    facts = status(pid)
    nobody = pwd.getpwnam("nobody")
    assert facts["Uid"] == [str(nobody.pw_uid)] * 4
    assert facts["Gid"] == [str(nobody.pw_gid)] * 4
    assert facts["Groups"] == []
    assert facts["CapEff"] == facts["CapPrm"] == facts["CapBnd"] == ["0" * 16]
    assert facts["NoNewPrivs"] == ["1"]
    async with asyncio.timeout(10):  # until the connection that asked for the pid has gone
        while (held := _descriptors(pid)).count("socket") > 5:  # noqa: ASYNC110  no event tells of a closed descriptor
            await asyncio.sleep(0.02)
    # Standard input, output and error; the table of shared counts, to lock it and to map it; the channel and a
    # listening socket for each of two listeners; our own epoll, of streams; the rest is uvloop's: an epoll, an event
    # descriptor and a socket pair for signals (the sandbox leaves it no io_uring).
    kinds = [kind for kind in held if kind not in ("/dev/null", "pipe")]
    assert kinds == ["/memfd"] * 2 + ["anon_inode"] * 3 + ["socket"] * 5


async def test_an_unprivileged_worker_still_resolves_names(supervise: Start) -> None:
    client = await (await supervise(user="nobody")).open()
    assert "127.0.0.1" in await client.ask("resolve localhost")


async def test_a_worker_that_dies_is_replaced_and_the_others_are_not_harmed(supervise: Start) -> None:
    server = await supervise(workers=2)
    victim, other = await server.open_to(0), await server.open_to(1)
    before = await server.pids()
    os.kill(before[0], signal.SIGKILL)
    assert await victim.ended() == "reset"  # not a clean end: what was cut short must not look complete
    assert (await other.ask("who"))["pid"] == before[1]
    assert (await (await server.open_to(0)).ask("who"))["pid"] != before[0]
    assert (await other.ask("who"))["pid"] == before[1]
    assert "ended with signal SIGKILL" in await server.logged("its replacement starts")


async def test_connections_in_a_dead_workers_queue_are_served_by_its_replacement(supervise: Start) -> None:
    server = await supervise(workers=1)
    pid = (await server.pids())[0]
    os.kill(pid, signal.SIGSTOP)
    waiting = [await server.open() for _ in range(50)]  # the kernel shakes hands, nobody accepts
    os.kill(pid, signal.SIGKILL)
    answers = await asyncio.gather(*(client.ask("who") for client in waiting))
    assert {answer["pid"] for answer in answers} == {(await server.pids())[0]}
    assert pid not in {answer["pid"] for answer in answers}


async def test_a_worker_that_hangs_is_replaced(supervise: Start) -> None:
    server = await supervise(workers=1, watchdog=4.0)
    pid = (await server.pids())[0]
    hanging = await server.open()
    hanging.writer.write(b"hang\n")
    await server.logged("hangs: silent for")
    await hanging.ended()
    assert (await server.pids())[0] != pid


async def test_workers_that_keep_dying_are_started_ever_more_slowly(supervise: Start, tmp_path: Path) -> None:
    server = await supervise("broken_from_the_second_start_on", workers=2, params={"directory": str(tmp_path)})
    other = await server.open_to(1)
    os.kill((await server.pids())[0], signal.SIGKILL)
    for pause in ("0.1", "0.2", "0.4", "0.8"):
        line = await server.logged(f"its replacement starts in {pause} s")
    assert "will not start again" in line
    assert (await other.ask("who"))["worker"] == 1


async def refused(server: Supervised) -> None:
    """Wait until new connections are refused."""
    for _ in range(600):
        try:
            await (await server.open()).close()
        except ConnectionRefusedError:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("new connections are still taken")


async def test_a_drain_waits_for_live_connections_and_takes_no_new_ones(supervise: Start) -> None:
    server = await supervise(drain=60)
    live = await server.open()
    await live.ask("who")
    server.signal(signal.SIGTERM)
    await refused(server)
    assert await live.ask("still here?") == "still here?\n"
    await live.close()
    assert await server.wait() == 0


async def test_a_drain_cuts_at_its_deadline(supervise: Start) -> None:
    server = await supervise(drain=0.5)
    live = await server.open()
    await live.ask("who")
    server.signal(signal.SIGTERM)
    assert await live.ended() == "reset"
    assert await server.wait() == 0
    assert "1 connections cut after 0.5 s" in await server.logged("1 connections cut")


async def test_a_second_signal_cuts_at_once(supervise: Start) -> None:
    server = await supervise(drain=3600)
    live = await server.open()
    await live.ask("who")
    server.signal(signal.SIGTERM)
    await server.logged("stopping: ")  # two signals that are pending at once are one
    assert await live.ask("still here?") == "still here?\n"
    server.signal(signal.SIGTERM)
    assert await live.ended() == "reset"
    assert await server.wait() == 0


async def test_a_worker_that_will_not_stop_is_killed(supervise: Start) -> None:
    server = await supervise(workers=1, drain=0.1)
    assert await (await server.open()).ask("hang") == "hanging"
    server.signal(signal.SIGTERM)
    assert await server.wait() == 0
    assert "killed" in await server.logged("does not end")


async def test_workers_end_when_the_supervisor_is_killed(supervise: Start) -> None:
    server = await supervise(user="nobody")
    pids = await server.pids()
    server.signal(signal.SIGKILL)
    for pid in pids.values():
        await gone(pid)


async def test_reload_puts_new_workers_in_place_and_drains_the_old(supervise: Start, tmp_path: Path) -> None:
    override = tmp_path / "plan.json"
    override.touch()
    server = await supervise(reload_from=str(override), params={"version": 1}, drain=60)
    old = await server.open()
    assert await old.ask("params") == {"version": 1}
    before = set((await server.pids()).values())
    override.write_text(json.dumps({"params": {"version": 2}, "workers": 3}))
    server.signal(signal.SIGHUP)
    await server.logged("reloaded")
    assert await (await server.open()).ask("params") == {"version": 2}
    assert len(await server.pids()) == 3
    assert await old.ask("params") == {"version": 1}
    await old.close()
    for pid in before:
        await gone(pid)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"target": "tests.process.applications:broken"}, "no such setting"),
        ({"target": "tests.process.applications:dies_while_loading"}, "signal SIGKILL before it served"),
        ({"target": "nonsense"}, "write module:attribute"),
    ],
)
async def test_a_reload_that_fails_changes_nothing(
    supervise: Start, tmp_path: Path, override: dict[str, str], message: str
) -> None:
    path = tmp_path / "plan.json"
    path.touch()
    server = await supervise(reload_from=str(path))
    before = await server.pids()
    path.write_text(json.dumps(override))
    server.signal(signal.SIGHUP)
    await server.logged("the old configuration stays")
    await server.logged(message)
    assert await server.pids() == before


@pytest.mark.parametrize(
    ("application", "message"),
    [
        ("broken", "KeyError: 'no such setting'"),
        ("dies_while_loading", "worker 0 ended with signal SIGKILL before it served"),
        ("not_a_service", "must be a service or a function that makes one"),
        ("missing", "has no 'missing'"),
        ("two_services", "makes no service for the listener main"),
    ],
)
async def test_an_application_that_does_not_load_is_told_and_nothing_stays(
    supervise: Start, application: str, message: str
) -> None:
    server = await supervise(application)
    assert message in server.failure
    assert await server.wait() == 2


async def test_workers_ask_the_supervisor(supervise: Start) -> None:
    client = await (await supervise(workers=1)).open()
    assert (await client.ask("ask sum"))["worker"] == 0
    assert await client.ask("ask refuse") == {"error": "worker 0 may not"}
    assert await client.ask("ask nonsense") == {"error": "nobody handles 'nonsense' here"}


async def test_an_answer_to_nothing_is_ignored(supervise: Start) -> None:
    server = await supervise(workers=1)
    client = await server.open()
    before = await server.pids()
    await client.ask('garble {"id": 5, "answer": {}}')
    assert await server.pids() == before


@pytest.mark.parametrize(
    "garbage",
    [
        "{",
        "null",
        "[]",
        '{"id": 5, "answer": {}, "error": 0}',
        '{"topic": "alive", "body": {}, "more": 1}',
        '{"topic": "alive", "body": {"more": 1}}',
        '{"topic": "' + "x" * 65 + '"}',
        '{"topic": "drained", "body": {"cut": 1, "seconds": 1e999}}',
        '{"topic": "drained", "body": {"cut": 123456789012345678901234567890, "seconds": 1}}',
        '{"topic": "drained", "body": {"cut": 0, "seconds": "inf"}}',
        '{"topic": "drained", "body": ' + "[" * 20_000 + "]" * 20_000 + "}",
        '{"topic": "sum", "body": {"from": [[[[1]]]]}}',
        '{"topic": "sum", "body": {"from": NaN}}',
    ],
    ids=range(13),
)
async def test_a_worker_that_garbles_its_channel_is_replaced_and_harms_nobody(supervise: Start, garbage: str) -> None:
    server = await supervise(workers=2, watchdog=30)
    other = await server.open_to(1)
    bad = await server.open_to(0)
    before = await server.pids()
    await bad.ask(f"garble {garbage}")
    await server.logged("has left its channel")
    await bad.ended()
    assert (await (await server.open_to(0)).ask("who"))["pid"] != before[0]
    assert (await other.ask("who"))["pid"] == before[1]


def test_bad_plans_are_refused() -> None:
    for changes, message in (
        ({"workers": 0}, "workers must be 1-1024"),
        ({"target": "module"}, "write module:attribute"),
        ({"listeners": (Listener("a", ()), Listener("a", ()))}, "two listeners have one name"),
    ):
        with pytest.raises(PlanError, match=message):
            Plan(**{"target": "a:b", "listeners": (), **changes})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no user 'no-such-user'"):
        UserIds.of("no-such-user")
    with pytest.raises(UserError, match="uid 0"):
        UserIds.of("root")


def test_every_socket_has_a_worker_and_every_worker_a_socket() -> None:
    for sockets in range(1, 6):
        held = tuple(bind_tcp("127.0.0.1", 0) for _ in range(sockets))
        listener = Listener("main", held)
        for workers in range(1, 6):
            indexes = [[index for index, _ in listener.for_worker(worker, workers)] for worker in range(workers)]
            assert all(indexes)
            assert {index for own in indexes for index in own} == set(range(sockets))
        for sock in held:
            sock.close()

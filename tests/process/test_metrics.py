from __future__ import annotations

import asyncio
import ctypes
import json
import os
import pwd
import signal
import socket
import stat
import struct
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from rama_ebpf.metrics.directory import sweep

from .conftest import Client, Start, Supervised, status


async def scrape(server: Supervised) -> dict[str, dict[tuple[str, ...], float]]:
    """Return every sample by name and the values of its labels, in the order of their names."""
    text = await asyncio.to_thread(fetch, server)
    samples: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(value for _, value in sorted(sample.labels.items()))] = (
                sample.value
            )
    return samples


def fetch(server: Supervised, path: str = "/metrics", **headers: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{server.ports[-1]}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


async def established(server: Supervised, worker: int) -> Client:
    """A connection to ``worker`` whose handshake is over."""
    while True:
        client = await server.open()
        client.writer.write(b"hello")
        if (await client.ask("who"))["worker"] == worker:
            return client
        await client.close()


async def until(server: Supervised, name: str, labels: tuple[str, ...], value: float) -> None:
    """Wait until a sample has a value."""
    seen: Any = None
    for _ in range(300):
        seen = (await scrape(server)).get(name, {}).get(labels)
        if seen == value:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{name}{labels} is {seen}, not {value}")


async def test_what_all_workers_count_is_added_up(supervise: Start) -> None:
    server = await supervise("measured", metrics=True, user="nobody")
    clients = [await established(server, worker) for worker in (0, 1)]
    await until(server, "rama_connections", ("main",), 2)
    before = await scrape(server)
    assert before["rama_handshakes_total"]["main", "established"] == before["rama_accepted_connections_total"]["main",]
    assert before["rama_workers"][()] == 2
    failing = await server.open()
    failing.writer.write(b"fail\n")
    await failing.ended()
    for client in clients:
        await client.close()
    await until(server, "rama_connections", ("main",), 0)
    after = await scrape(server)
    assert after["rama_errors_total"] == {("protocol", "main"): 1}
    assert after["rama_handshakes_total"]["main", "protocol"] == 1
    accepted = after["rama_accepted_connections_total"]["main",]
    # Each established connection sent "hello" and "who\n".
    assert after["rama_received_bytes_total"]["main",] == (accepted - 1) * 9 + 5
    assert after["rama_connection_duration_seconds_count"]["main",] == accepted


async def test_a_dead_workers_connections_are_forgotten_and_its_counts_are_not(supervise: Start) -> None:
    server = await supervise("measured", metrics=True, workers=1)
    await established(server, 0)
    await until(server, "rama_connections", ("main",), 1)
    accepted = (await scrape(server))["rama_accepted_connections_total"]["main",]
    files: set[str] = set()
    for _ in range(2):
        client = await server.open()
        client.writer.write(b"hello")
        pid = (await client.ask("who"))["pid"]
        os.kill(pid, signal.SIGKILL)
        await client.ended()
        await established(server, 0)
        accepted += 2
        await until(server, "rama_connections", ("main",), 1)
        samples = await scrape(server)
        assert samples["rama_accepted_connections_total"]["main",] == accepted
        found = {path.name for path in await asyncio.to_thread(server.metrics_files)}
        assert not files or found == files  # those of the dead are added up and gone
        files = found
    assert samples["rama_worker_restarts_total"][()] == 2


async def test_verdicts_and_both_formats(supervise: Start) -> None:
    server = await supervise(metrics=True)
    samples = await scrape(server)
    assert samples["rama_verdicts_total"] == {("drop", "", "ban"): 3, ("allow", "office", "rule"): 5}
    text = await asyncio.to_thread(fetch, server, Accept="application/openmetrics-text; version=1.0.0")
    assert "rama_verdicts" in {family.name for family in parse_openmetrics(text)}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        await asyncio.to_thread(fetch, server, "/")


async def test_running_out_of_descriptors_pauses_and_is_counted(supervise: Start) -> None:
    server = await supervise("measured", metrics=True, workers=1, descriptors=40)
    clients = [await server.open() for _ in range(60)]
    await server.logged("cannot accept (Too many open files)")
    for client in clients:
        await client.close()
    await established(server, 0)
    assert (await scrape(server))["rama_accept_pauses_total"]["main",] >= 1


async def test_nothing_stays_of_the_files(supervise: Start) -> None:
    server = await supervise("measured", metrics=True, drain=0.1)
    await established(server, 0)
    assert await asyncio.to_thread(server.metrics_files)
    server.signal(signal.SIGTERM)
    await server.wait()
    assert not await asyncio.to_thread(server.metrics_files)


async def test_files_of_a_killed_server_are_swept_by_the_next_and_those_of_a_live_one_stay(
    supervise: Start, tmp_path: Path
) -> None:
    server = await supervise("measured", metrics=True)
    await established(server, 0)
    files = await asyncio.to_thread(server.metrics_files)
    assert files
    await asyncio.to_thread(sweep, server.temporary)
    assert await asyncio.to_thread(server.metrics_files) == files
    server.signal(signal.SIGKILL)
    await server.wait()
    assert await asyncio.to_thread(server.metrics_files) == files
    (server.temporary / "rama-ebpf-metrics-1-link").symlink_to(tmp_path)
    (tmp_path / "kept").touch()
    await asyncio.to_thread(sweep, server.temporary)
    assert not any(path.exists() for path in files)
    assert (tmp_path / "kept").exists()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _key(text: bytes) -> bytes:
    padded = text + b" " * (8 - (len(text) + 4) % 8)
    entry = struct.pack("=i", len(text)) + padded + struct.pack("=dd", 1.0, 0.0)
    return struct.pack("=ii", 8 + len(entry), 0) + entry


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a FIFO": _fifo,
    "a directory": Path.mkdir,
    "a link": lambda path: path.symlink_to("/proc/self/environ"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a length of 2 GiB": lambda path: path.write_bytes(struct.pack("=ii", 0x7FFFFFFF, 0) + b"x" * 100),
    "a negative length": lambda path: path.write_bytes(struct.pack("=iii", 100, 0, -8) + b"x" * 100),
    "a key of 2 GiB": lambda path: path.write_bytes(struct.pack("=iii", 100, 0, 0x7FFFFFFF) + b"x" * 100),
    "a huge file": lambda path: path.touch() or os.truncate(path, 1 << 40),
    "garbage": lambda path: path.write_bytes(os.urandom(4096)),
    "deep nesting": lambda path: path.write_bytes(_key(b"[" * 4000)),
    "another's name": lambda path: path.write_bytes(_key(b'["node_x", "node_x", {}, ""]')),
    "labels that are none": lambda path: path.write_bytes(_key(b'["rama_x", "rama_x", {"a": [1]}, ""]')),
    "another type": lambda path: path.write_bytes(_key(b'["rama_connections", "rama_connections", {}, ""]')),
}


@pytest.mark.parametrize("harm", HOSTILE)
async def test_whatever_a_worker_leaves_among_the_files_costs_that_file_only(supervise: Start, harm: str) -> None:
    server = await supervise("measured", metrics=True)
    await established(server, 0)
    await until(server, "rama_connections", ("main",), 1)
    (directory,) = server.temporary.glob("rama-ebpf-metrics-*")
    HOSTILE[harm](directory / "histogram_7g9.db")
    samples = await scrape(server)
    assert samples["rama_connections"] == {("main",): 1}
    assert samples["rama_workers"] == {(): 2}
    assert not {name for name in samples if not name.startswith("rama_")}
    await server.logged("histogram_7g9.db do not count")
    lines = len(server.log)
    await scrape(server)
    assert not any("do not count" in line for line in server.log[lines:])


async def test_reloads_leave_no_files_and_no_count_is_lost(supervise: Start) -> None:
    server = await supervise("measured", metrics=True, drain=0.1)
    for reload in range(1, 5):
        for worker in (0, 1):
            await (await established(server, worker)).close()
        await until(server, "rama_connections", ("main",), 0)
        before = (await scrape(server))["rama_accepted_connections_total"]["main",]
        server.signal(signal.SIGHUP)
        await until(server, "rama_reloads_total", (), reload)
        await until(server, "rama_workers", (), 2)
        assert (await scrape(server))["rama_accepted_connections_total"]["main",] == before
        for _ in range(300):  # the old workers drain for a moment
            names = {path.stem for path in await asyncio.to_thread(server.metrics_files)}
            if len({name.rpartition("g")[2] for name in names}) <= 1:
                break
            await asyncio.sleep(0.1)
            await scrape(server)
        else:
            raise AssertionError(f"files of earlier generations stay: {names}")
        assert (await scrape(server))["rama_accepted_connections_total"]["main",] == before


def server_of_metrics(server: Supervised) -> int:
    """The process id of the child that serves them."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (found,) = (pid for pid in children if b"metrics_child" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return int(found)


async def test_metrics_are_served_by_a_process_that_may_do_nothing_else(supervise: Start) -> None:
    server = await supervise("measured", metrics=True, user="nobody")
    await scrape(server)
    facts = status(server_of_metrics(server))
    assert facts["Uid"] == [str(pwd.getpwnam("nobody").pw_uid)] * 4
    assert facts["Groups"] == []
    assert facts["CapEff"] == facts["CapPrm"] == facts["CapBnd"] == ["0" * 16]
    assert facts["NoNewPrivs"] == ["1"]
    assert facts["Seccomp"] == ["2"]
    (directory,) = server.temporary.glob("rama-ebpf-metrics-*")
    assert {path.stat().st_uid for path in (directory, *directory.iterdir())} == {0}
    assert directory.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_metrics_are_served_again_after_their_process_has_ended_or_was_stopped(
    supervise: Start, number: signal.Signals
) -> None:
    server = await supervise("measured", metrics=True)
    await established(server, 0)
    await until(server, "rama_connections", ("main",), 1)
    os.kill(server_of_metrics(server), number)
    await server.logged("serving metrics failed")
    samples = await scrape(server)
    assert samples["rama_connections"] == {("main",): 1}
    assert samples["rama_failures_total"] == {("serving metrics",): 1}


async def test_a_process_of_metrics_that_breaks_its_protocol_is_replaced(supervise: Start) -> None:
    """What it may ask for is bounded: taken over, it gets neither other files nor anything removed."""
    server = await supervise("measured", metrics=True)
    await scrape(server)
    (directory,) = server.temporary.glob("rama-ebpf-metrics-*")
    kept = await asyncio.to_thread(server.metrics_files)
    victim = server_of_metrics(server)
    # Another end of its channel: it is its descriptor 3 or above, the only socket of packets.
    pidfd = os.pidfd_open(victim)
    for number in sorted(map(int, os.listdir(f"/proc/{victim}/fd"))):
        fd = int(ctypes.CDLL(None).syscall(438, pidfd, number, 0))  # pidfd_getfd(2)
        if fd < 0:
            continue  # it was closed meanwhile
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            channel = socket.socket(fileno=fd)
            if channel.type == socket.SOCK_SEQPACKET:
                break
            channel.close()
        else:
            os.close(fd)
    else:
        raise AssertionError("it has no channel")
    os.close(pidfd)
    os.kill(victim, signal.SIGSTOP)
    channel.settimeout(20)
    names = ["../victim", "/etc/passwd", *(path.name for path in kept)]
    channel.send(json.dumps({"ask": False, "added": names}).encode())
    assert json.loads(channel.recv(4096))["last"]
    assert await asyncio.to_thread(server.metrics_files) == kept
    channel.send(b'{"ask": true, "added": [], "path": "/etc/shadow"}')
    await server.logged("breaks its protocol")
    channel.close()
    assert (await scrape(server))["rama_workers"][()] == 2
    assert await asyncio.to_thread(directory.exists)


async def test_idle_connections_do_not_keep_a_scraper_out(supervise: Start) -> None:
    server = await supervise("measured", metrics=True)
    idle = [await server.open(-1) for _ in range(40)]
    assert (await scrape(server))["rama_workers"][()] == 2
    assert not any(client.reader.at_eof() for client in idle)

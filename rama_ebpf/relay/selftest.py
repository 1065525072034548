"""The self-test that the kernel's relay must pass on the running kernel before it is used.

It moves real bytes through the very maps and program that are to serve, in a child process and a network of its own:
64 MiB both ways at once, half-close, a reader that stalls, and segments that overlap and come out of order. Kernels
with known faults are refused by their version, without a try.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

from ..core.interpreter import module_command
from ..core.socket_stream import SocketStream
from ..kernel.veth import isolate_with_veth
from .choice import Choice
from .engine import Engine
from .options import RelayKind, TunnelLimits
from .report import CloseReason, TunnelReport
from .sockmap import Sockmap
from .synthetic import Wire, segment_plan

__all__ = ["KNOWN_BAD", "SelfTest", "known_bad", "self_test"]

_TIMEOUT: Final = 100.0
_BULK: Final = 64 << 20
_PIECE: Final = 64 << 10
_WORDS: Final = 20
_STALLED: Final = 24 << 20
_HELD: Final = 16 << 20
_SYNTHETIC: Final = 60
_NEAR, _FAR = ("near", "02:00:00:00:00:01"), ("far", "02:00:00:00:00:02")
_OURS, _THEIRS = IPv4Interface("198.18.0.1/24"), IPv4Address("198.18.0.2")
_PATTERN: Final = random.Random(64).randbytes(1_048_573) * 2  # a prime length, so that no shift goes unseen

_REPEATS: Final = "it repeats bytes after a partial send (fixed by 'bpf, sockmap: fix duplicated data transmission')"

KNOWN_BAD: Final = (
    ((0, 0, 0), (6, 1, 0), "it is older than 6.1, the oldest that this was made for"),
    ((6, 4, 0), (6, 6, 0), _REPEATS),
    ((6, 7, 0), (6, 12, 34), _REPEATS),
    ((6, 13, 0), (6, 15, 0), _REPEATS),
)
"""Ranges of kernel versions, the first in and the last out, and what is wrong with them. Series that got the fix in
some update are not named, or from that on: there the test of a stalled reader decides."""


@dataclass(frozen=True)
class SelfTest:
    """What came of it. ``refusal`` is empty if all was right, else it says what was not."""

    refusal: str
    seconds: float


def known_bad(release: str) -> str:
    """Return what is wrong with a kernel by its release (``uname -r``), or an empty string."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if match is None:
        return f"the kernel's release {release!r} cannot be read"
    version = int(match[1]), int(match[2]), int(match[3] or 0)
    for first, last, fault in KNOWN_BAD:
        if first <= version < last:
            return f"kernel {release} is known to be bad: {fault}"
    return ""


async def self_test(fds: Mapping[str, int], release: str | None = None, timeout: float = _TIMEOUT) -> SelfTest:
    """Try the kernel's relay whose descriptors are ``fds`` (of :class:`~rama_ebpf.kernel.splice.SpliceMaps`).

    It fails if it is not done after ``timeout`` seconds; a quarter of them is for each of its checks.
    Needs CAP_SYS_ADMIN and CAP_NET_ADMIN, for the network; takes some seconds. Never raises for what the kernel does.
    """
    started = time.monotonic()
    refusal = known_bad(platform.release() if release is None else release) or await _run_child(fds, timeout)
    return SelfTest(refusal, time.monotonic() - started)


async def _run_child(fds: Mapping[str, int], timeout: float) -> str:
    child = await asyncio.create_subprocess_exec(
        *module_command(__spec__.name, json.dumps(dict(fds)), str(timeout)),
        pass_fds=list(fds.values()),
        stdin=asyncio.subprocess.PIPE,  # the child ends when we do
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout):
            assert child.stderr is not None
            words = await child.stderr.read()
            await child.wait()
    except TimeoutError:
        return f"the self-test did not end within {timeout:g} s"
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        return f"the self-test failed: {(words.decode().strip() or 'no word').splitlines()[-1]}"
    return ""


# -- in the child ------------------------------------------------------------------------------------------------------


class _Failed(Exception):
    pass


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise _Failed(text)


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    far.setblocking(False)
    return far, near


async def _send(sock: socket.socket, count: int, sent: int = 0, ahead: asyncio.Semaphore | None = None) -> None:
    """Send the bytes from number ``sent`` to ``count`` of the pattern, and FIN, each piece when ``ahead`` lets it."""
    loop = asyncio.get_running_loop()
    period = len(_PATTERN) // 2
    view = memoryview(_PATTERN)
    while sent < count:
        if ahead is not None:
            await ahead.acquire()
        start = sent % period
        chunk = view[start : start + min(_PIECE, count - sent)]
        await loop.sock_sendall(sock, chunk)
        sent += len(chunk)
    sock.shutdown(socket.SHUT_WR)


async def _receive(sock: socket.socket, got: int = 0, ahead: asyncio.Semaphore | None = None) -> int:
    """Read to the end; return how many bytes came with ``got`` earlier ones, all of them right."""
    loop = asyncio.get_running_loop()
    period = len(_PATTERN) // 2
    view, buffer = memoryview(_PATTERN), memoryview(bytearray(262_144))
    while count := await loop.sock_recv_into(sock, buffer):
        start = got % period
        _require(buffer[:count] == view[start : start + count], f"wrong bytes after {got}")
        if ahead is not None:
            for _ in range((got + count) // _PIECE - got // _PIECE):
                ahead.release()
        got += count
    return got


async def _relayed(
    peers: Callable[[socket.socket, socket.socket], Awaitable[None]], *, send_buffer: int = 0
) -> TunnelReport:
    """Let ``peers`` talk through the relay, and check how the tunnel went."""
    (client, client_near), (upstream, upstream_near) = _pair(), _pair()
    if send_buffer:
        upstream_near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    tunnel = Engine.current().open(
        SocketStream(client_near), SocketStream(upstream_near), Choice(RelayKind.SOCKMAP, ""), TunnelLimits()
    )
    with client, upstream:
        await peers(client, upstream)
    await tunnel.end()
    _require(tunnel.reason is CloseReason.EOF, f"the tunnel ended with {tunnel.reason}")
    report = tunnel.report()
    _require(report.relay == "sockmap", report.why)
    return report


async def _bulk() -> None:
    async def peers(client: socket.socket, upstream: socket.socket) -> None:
        [tunnel] = Engine.current().tunnels
        async with asyncio.TaskGroup() as group:
            received = []
            for sender, receiver in ((client, upstream), (upstream, client)):
                # Not so far ahead that userspace would have to take over: here it is the kernel that is tried.
                ahead = asyncio.Semaphore(8)
                group.create_task(_send(sender, _BULK, ahead=ahead))
                received.append(group.create_task(_receive(receiver, ahead=ahead)))
        _require([task.result() for task in received] == [_BULK, _BULK], "bytes are missing")
        for direction in (tunnel.up, tunnel.down):
            _require(direction.delivered < _BULK // 2, "the kernel moves too little")

    report = await _relayed(peers)
    _require((report.to_upstream, report.to_client) == (_BULK, _BULK), "the counters are wrong")


async def _half_close() -> None:
    async def peers(client: socket.socket, upstream: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for byte in _PATTERN[:_WORDS]:
            await loop.sock_sendall(client, bytes([byte]))
            _require(await loop.sock_recv(upstream, 2) == bytes([byte]), "wrong bytes")
        client.shutdown(socket.SHUT_WR)  # all bytes are there: the FIN comes alone
        _require(await _receive(upstream, _WORDS) == _WORDS, "bytes from nowhere")
        async with asyncio.TaskGroup() as group:
            group.create_task(_send(upstream, 200_000))
            received = group.create_task(_receive(client))
        _require(received.result() == 200_000, "the other direction has ended")

    await _relayed(peers)


async def _stall() -> None:
    async def peers(client: socket.socket, upstream: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for byte in _PATTERN[:3]:  # the first passes, and then the kernel takes over
            await loop.sock_sendall(client, bytes([byte]))
            _require(await loop.sock_recv(upstream, 2) == bytes([byte]), "wrong bytes at the start")
        sending = asyncio.create_task(_send(client, _STALLED, 3))
        await asyncio.sleep(0.3)
        [tunnel] = Engine.current().tunnels
        _require(tunnel.up.moved <= _HELD and not sending.done(), "the kernel takes bytes without bound")
        _require(await _receive(upstream, 3) == _STALLED, "bytes are missing")
        await sending
        upstream.shutdown(socket.SHUT_WR)
        _require(await _receive(client) == 0, "bytes from nowhere")

    # A small send buffer makes the kernel's sends partial, where some kernels repeat bytes.
    await _relayed(peers, send_buffer=65_536)


async def _overlap() -> None:
    loop = asyncio.get_running_loop()
    wire = Wire(_FAR[0], bytes.fromhex(_NEAR[1].replace(":", "")), _THEIRS, _OURS.ip)
    rng = random.Random(8)
    with socket.create_server((str(_OURS.ip), 0)) as listener:
        listener.setblocking(False)
        for number in range(_SYNTHETIC):
            plan = segment_plan(rng, ("clean", "overlapping", "reordered")[number % 3])
            arrived = asyncio.Event()
            local = wire.reserve()
            accepting = asyncio.create_task(loop.sock_accept(listener))
            connection = await wire.connect(listener.getsockname()[1], local)
            accepted, _ = await accepting
            far, near = _pair()
            tunnel = Engine.current().open(
                SocketStream(accepted), SocketStream(near), Choice(RelayKind.SOCKMAP, ""), TunnelLimits()
            )
            playing = asyncio.create_task(connection.play(plan, _PATTERN[: plan.size], arrived))
            with far:
                data = await _read_all(far, arrived)
            await playing
            await tunnel.end()
            connection.close()
            _require(data == _PATTERN[: plan.size], "wrong bytes")
            _require(tunnel.relay_and_why()[0] == "sockmap", tunnel.why)
    wire.close()


async def _read_all(sock: socket.socket, arrived: asyncio.Event) -> bytes:
    data = bytearray()
    while chunk := await asyncio.get_running_loop().sock_recv(sock, 65_536):
        data += chunk
        arrived.set()
    return bytes(data)


_CHECKS: Final = {"half-close": _half_close, "bulk": _bulk, "stalled reader": _stall, "overlapping segments": _overlap}


async def _child(fds: Mapping[str, int], timeout: float) -> None:
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), lambda: os._exit(1))
    Engine.current().use_sockmap(Sockmap(fds))
    for name, check in _CHECKS.items():
        try:
            async with asyncio.timeout(timeout / len(_CHECKS)):
                await check()
        except (_Failed, OSError, BaseExceptionGroup) as error:
            what = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
            sys.exit(f"{name}: {what or type(what).__name__}")
    sys.stderr.flush()
    os._exit(0)  # at once: nothing here is worth an orderly end


if __name__ == "__main__":
    isolate_with_veth(_NEAR, _FAR, _OURS, str(_THEIRS))
    asyncio.run(_child(json.loads(sys.argv[1]), float(sys.argv[2])))

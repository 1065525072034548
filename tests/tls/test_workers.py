"""Sessions across the workers of a supervisor: whichever one a client comes back to resumes it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl

from ..process.conftest import Start, gone, supervise
from .conftest import HOST
from .pki import Authority

__all__ = ["supervise"]


async def test_every_worker_and_every_replacement_resumes_a_session_that_another_began(
    supervise: Start, authority: Authority, trust: ssl.SSLContext
) -> None:
    leaf = authority.issue("a.test", stem="workers")
    server = await supervise("resuming", workers=2, params={"chain": str(leaf.chain), "key": str(leaf.key)})
    session: ssl.SSLSession | None = None

    def connect() -> tuple[int, int, bool]:
        nonlocal session
        with (
            socket.create_connection((HOST, server.ports[0]), timeout=30) as sock,
            trust.wrap_socket(sock, server_hostname="a.test", session=session) as tls,
        ):
            said = json.loads(tls.recv(100))
            session = tls.session
        return said["worker"], said["pid"], said["resumed"]

    async def both_workers() -> set[tuple[int, int, bool]]:
        """Connect until both have answered."""
        seen: set[tuple[int, int, bool]] = set()
        while {worker for worker, _, _ in seen} != {0, 1}:
            seen.add(await asyncio.to_thread(connect))
        return seen

    first = await asyncio.to_thread(connect)
    assert first[2] is False
    before = await both_workers()
    assert all(resumed for _, _, resumed in before)
    for _, pid, _ in before:
        os.kill(pid, signal.SIGKILL)
        await gone(pid)
    after = await both_workers()
    assert all(resumed for _, _, resumed in after)
    assert {pid for _, pid, _ in after}.isdisjoint({pid for _, pid, _ in before})

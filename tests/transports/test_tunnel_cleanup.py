from __future__ import annotations

import asyncio
import socket

from rama_ebpf.core import SocketStream
from rama_ebpf.relay import TunnelLimits
from rama_ebpf.relay.copy import copy


async def test_a_cancellation_at_any_moment_of_a_tunnels_end_leaves_no_socket_open() -> None:
    for turns in range(12):
        client_end, client = socket.socketpair()
        upstream_end, upstream = socket.socketpair()
        for sock in (client_end, upstream_end):
            sock.shutdown(socket.SHUT_WR)
        task = asyncio.create_task(copy(SocketStream(client), SocketStream(upstream), TunnelLimits(), why=""))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # Cancelled before its first step the tunnel never had the streams; whoever made them closes them.
        closed = (client.fileno(), upstream.fileno()) == (-1, -1)
        for sock in (client_end, client, upstream_end, upstream):
            sock.close()
        assert closed or turns == 0, f"open after a cancellation in turn {turns}"

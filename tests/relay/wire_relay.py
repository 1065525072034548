"""The wire relay for the tunnels of this event loop: its process, as a server starts it."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rama_ebpf.control.wire import WireRelay
from rama_ebpf.core.address import SocketAddress
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.kernel.privileges import UserIds
from rama_ebpf.process import Nursery
from rama_ebpf.relay.wire import Wire

from ..lab import PATIENCE

_numbers = itertools.count()


def an_instance() -> Instance:
    """An instance of our own, whose files below /run are to be removed."""
    return Instance(f"test-{os.getpid()}-wire-{next(_numbers)}")


@asynccontextmanager
async def wire_relay(*listeners: socket.socket) -> AsyncIterator[WireRelay]:
    """Have it for clients that come by ``listeners``."""
    addresses = [SocketAddress.from_sockaddr(listener.getsockname()) for listener in listeners]
    changed = asyncio.Event()
    async with Nursery() as nursery:
        instance = an_instance()
        relay = WireRelay(
            instance,
            nursery,
            lambda: addresses,
            workers=1,
            user=UserIds.of_workers(),
            kernel_headers=None,
            on_change=changed.set,
        )
        wire = Wire.current()
        try:
            wire.use(relay.descriptors(wanted=True)["wire"])
            async with asyncio.timeout(60 * PATIENCE):
                while wire.refusal:
                    assert relay.status.state != "refused", relay.status
                    await asyncio.sleep(0.02)
            yield relay
        finally:
            wire.close()
            relay.close()
    shutil.rmtree(instance.run_dir)

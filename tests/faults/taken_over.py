"""An echo service in a worker that breaks its channel when a client says so."""

from __future__ import annotations

import os
import random

from rama_ebpf.core import Service, Stream, stack
from rama_ebpf.process import WorkerContext

from .test_channel import hostile

__all__ = ["application"]


def application(context: WorkerContext) -> Service[Stream]:
    """Make it."""

    async def echo(stream: Stream) -> None:
        while data := await stream.read():
            if data == b"fuzz!":
                writer = context.channel._writer
                assert writer is not None
                chance = random.Random(os.getpid())
                for _ in range(500):
                    writer.write(hostile(chance))
                await writer.drain()
            await stream.write(data)

    return stack(echo)

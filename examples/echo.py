"""An echo service with a log layer and a concurrency limit, the first stack of rama's README::

rama-ebpf run echo:server --listen 127.0.0.1:7007
"""

from __future__ import annotations

from rama_ebpf.core import Stream, stack
from rama_ebpf.layers import AccessLogLayer, ConcurrencyLimitLayer


async def echo(stream: Stream) -> None:
    """Send back what comes, until the client has said all."""
    while data := await stream.read():
        await stream.write(data)


# `run` writes an access log by itself; a stack that is served otherwise has its own layer for it.
server = stack(AccessLogLayer(lambda record: print(f"echo: {record}", flush=True)), ConcurrencyLimitLayer(2), echo)

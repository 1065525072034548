"""A worker's side of the relay: it asks the server process for the kernel's relay, and says which tunnels live."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import cast

from ..process.channel import Channel
from ..process.plan import Json
from ..relay import tunnels
from ..relay.engine import Engine
from ..relay.sockmap import Sockmap
from ..relay.wire import Wire
from ..services.http.exchange.running import running
from .adopted import Adoption

__all__ = ["serve_relay"]


def serve_relay(
    channel: Channel, fds: Mapping[str, int], services: Mapping[str, object], *, ask: bool
) -> Callable[[], None]:
    """Connect the running event loop's tunnels with the server process. ``fds`` are the worker's descriptors,
    ``services`` those of its listeners, which tunnels of earlier workers count in. Return what lets go of those that
    survive us.

    ``ask`` for the kernel's relay at once, or when the first tunnel wants it.
    """
    engine = Engine.current()
    maps = {name.removeprefix("relay-"): fd for name, fd in fds.items() if name.startswith("relay-")}

    def answer(body: Json) -> None:
        if "refusal" in body:
            engine.sockmap_refusal = str(body["refusal"])
            return
        try:
            share, shares = cast("int", body["share"]), cast("int", body["shares"])
            engine.use_sockmap(Sockmap(maps, share, shares))
        except OSError as error:
            engine.sockmap_refusal = f"the worker cannot use it ({errno.errorcode.get(error.errno or 0, error)})"
            raise

    def flows(_body: Json) -> Json:
        """What ``rama-ebpf flows`` shows of this worker: its tunnels, and the HTTP requests that it serves."""
        return {
            "flows": [flow.as_json() for flow in (*tunnels, *running)],
            "refused": engine.refused() | Wire.current().refused,
            "ended": [
                {"relay": relay, "reason": reason.value, "count": count}
                for (relay, reason), count in tunnels.ended.items()
            ],
        }

    engine.sockmap_refusal = "not loaded yet"
    engine.on_sockmap_wanted = lambda: channel.notify("sockmap")
    channel.on("sockmap", answer)
    channel.on("flows", flows)
    if ask:
        engine.want_sockmap()
    adoption, wires = Adoption(services), []
    if "wire" in fds:
        wires.append(Wire.current())
        wires[0].use(fds["wire"], adoption)
    for name, fd in fds.items():
        if name.startswith("elder-"):  # processes of earlier servers
            wires.append(Wire())
            wires[-1].use(fd, adoption)

    def let_go() -> None:
        for wire in wires:
            wire.let_go()

    return let_go

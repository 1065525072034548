"""Large bodies by splice(2): from socket to socket within the kernel, where nothing looks at them on the way.

That is so where both sides are plain sockets, the length is known and no layer has put a body of its own around it.
A pipe is held only while bytes are in it. A body begins by copying, and small pieces go on being copied: for those two
calls of splice cost more than a copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from ....core.socket_stream import SocketStream
from ....core.stream import Stream
from ....relay.pipes import PipePool
from ..message.model import Body

__all__ = ["move", "worth_moving"]

_WORTH: Final = 128 * 1024
"""How many bytes must be left of a body."""
_FAST: Final = 32 * 1024
"""How large a piece says that the next one will be large as well."""

_pipes: Final = PipePool(limit=256)


def worth_moving(body: Body, last: int) -> bool:
    """Whether it is worth trying to :func:`move` what comes next. ``last`` is the size of the piece before."""
    return last >= _FAST and body.movable >= _WORTH


async def move(body: Body, sink: Stream, count: Callable[[int], object]) -> int:
    """Move the next bytes of ``body`` to ``sink`` and return how many: 0 if there are none now, or it cannot be, and
    the body's ``next`` is to be asked. ``count`` is told what will be written. Raises what writing to ``sink``
    raises."""
    if not isinstance(sink, SocketStream):
        return 0
    pipe = _pipes.take()
    if pipe is None:
        return 0
    moved = 0
    try:
        moved = body.splice_to(pipe[1])
        if moved:
            count(moved)
            await sink.splice_from(pipe[0], moved)
    except BaseException:
        _pipes.destroy(pipe)
        raise
    _pipes.give(pipe)
    if moved:
        await asyncio.sleep(0)  # neither side may ever have to be waited for: others want their turn
    return moved

"""What a process that holds tunnels of the wire relay says to servers."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["Word"]

_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Identity = Annotated[int, Meta(ge=0, le=2**62)]


class Word(msgspec.Struct, forbid_unknown_fields=True):
    """``refused`` says why it cannot be; ``stays`` answers a server that leaves: how many tunnels go on. ``cgroups``
    are the ids of those to which its tunnels' sockets belong, as its first server has told it."""

    refused: Annotated[str, Meta(max_length=4096)] = ""
    tunnels: _Count = 0
    taken: _Count = 0
    stays: _Count | None = None
    cgroups: Annotated[list[_Identity], Meta(max_length=64)] = []

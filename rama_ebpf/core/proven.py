"""Proven passwords: who has shown the right one lately, under a keyed hash that tells nobody the password."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

__all__ = ["PROVEN_BYTES", "LocalProven", "Proven", "SharesProven", "proven_token"]

PROVEN_BYTES: Final = 24
"""Size of a token."""
_MOST: Final = 16384


class Proven(Protocol):
    """Remembers tokens for a while. It may forget early, and never remembers what was not added."""

    def token(self, name: str, password: str, proof: str, /) -> bytes:
        """The keyed hash of a user's name, password, and the line that it was proven against."""

    def holds(self, token: bytes, /) -> bool: ...

    def add(self, token: bytes, seconds: float, /) -> None: ...


class SharesProven(Protocol):
    """Who remembers for several processes; in a worker of ``rama-ebpf run`` that is ``context.shared``."""

    def proven(self) -> Proven: ...


def proven_token(key: bytes, name: str, password: str, proof: str) -> bytes:
    """Return :data:`PROVEN_BYTES` bytes; ``key`` is 32 bytes."""
    digest = hashlib.blake2b(digest_size=PROVEN_BYTES, key=key, person=b"proven")
    for part in (name, password, proof):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


class LocalProven:
    """The memory of one process, of at most 16,384 tokens; ``clock`` is monotonic seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = secrets.token_bytes(32)
        self._clock = clock
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def token(self, name: str, password: str, proof: str, /) -> bytes:
        """See :class:`Proven`."""
        return proven_token(self._key, name, password, proof)

    def holds(self, token: bytes, /) -> bool:
        """See :class:`Proven`."""
        return self._until.get(token, float("-inf")) > self._clock()

    def add(self, token: bytes, seconds: float, /) -> None:
        """See :class:`Proven`."""
        self._until[token] = self._clock() + seconds
        self._until.move_to_end(token)
        if len(self._until) > _MOST:
            self._until.popitem(last=False)

"""Who is at the other end: says bytes, expects bytes, and tells what came instead."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from ..core.stream import Stream
from .patience import PATIENCE

__all__ = ["Peer"]

_PATIENCE: Final = 10.0
_SHOWN: Final = 200


class Peer:
    """Speaks at one end of a stream, by a script that a test writes line by line.

    Nothing waits longer than ``patience`` seconds (times ``$RAMA_EBPF_PATIENCE``): then, and where something else comes
    than was expected, AssertionError says what came.
    """

    def __init__(self, stream: Stream, *, patience: float = _PATIENCE) -> None:
        self.stream = stream
        """The end that it speaks at."""
        self._patience = patience * PATIENCE

    async def say(self, data: bytes) -> None:
        """Send bytes. Returns when all of them are on their way."""
        async with self._bounded(f"the other end does not read {_shown(data)}"):
            await self.stream.write(data)

    async def expect(self, data: bytes) -> None:
        """Receive exactly these bytes. What comes after them is left for the next call."""
        came = bytearray()
        try:
            async with self._bounded(""):
                while len(came) < len(data) and data.startswith(came):
                    more = await self.stream.read(len(data) - len(came))
                    if not more:
                        raise AssertionError(f"expected {_shown(data)}, but the stream ended after {_shown(came)}")
                    came += more
        except ConnectionError as error:
            raise AssertionError(f"expected {_shown(data)}, but after {_shown(came)}: {error}") from error
        except TimeoutError:
            raise AssertionError(f"expected {_shown(data)}, but only {_shown(came)} came") from None
        if came != data:
            raise AssertionError(f"expected {_shown(data)}, but {_shown(came)} came")

    async def receive(self, count: int) -> bytes:
        """Return exactly ``count`` bytes, 0 to 65536. Raises :class:`~rama_ebpf.core.PeerClosed` at an earlier EOF."""
        async with self._bounded(f"{count} bytes did not come"):
            return await self.stream.read_exactly(count)

    async def receive_until(self, end: bytes, *, limit: int = 64 * 1024) -> bytes:
        """Return what comes up to ``end`` and with it, ``limit`` bytes at most."""
        async with self._bounded(f"{_shown(end)} did not come"):
            while (at := self.stream.buffered.find(end)) < 0:
                if not await self.stream.fill(limit):
                    raise AssertionError(
                        f"the stream ended after {_shown(self.stream.buffered)}, without {_shown(end)}"
                    )
            return await self.stream.read_exactly(at + len(end))

    async def receive_all(self) -> bytes:
        """Return everything up to EOF."""
        came = bytearray()
        async with self._bounded("the stream did not end"):
            while more := await self.stream.read():
                came += more
        return bytes(came)

    async def expect_eof(self) -> None:
        """The other end has ended in order, and nothing comes before that."""
        try:
            async with self._bounded("the stream did not end"):
                came = await self.stream.read()
        except ConnectionError as error:
            raise AssertionError(f"expected the stream to end in order, but: {error}") from error
        if came:
            raise AssertionError(f"expected the end of the stream, but {_shown(came)} came")

    async def expect_reset(self) -> None:
        """The other end has reset (TCP: RST). What came before that is dropped."""
        with contextlib.suppress(ConnectionError):
            async with self._bounded("the stream was not reset"):
                while await self.stream.read():
                    pass
            raise AssertionError("expected a reset, but the stream ended in order")

    async def end(self) -> None:
        """Half-close: no more bytes follow, and receiving goes on."""
        await self.stream.write_eof()

    async def close(self) -> None:
        """Close both directions in order."""
        await self.stream.close()

    def reset(self) -> None:
        """Go at once (TCP: RST)."""
        self.stream.abort()

    @contextlib.asynccontextmanager
    async def _bounded(self, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._patience):
                yield
        except TimeoutError:
            if not what:
                raise
            raise AssertionError(f"{what} within {self._patience:g} s") from None


def _shown(data: bytes | bytearray) -> str:
    more = f" … ({len(data)} bytes)" if len(data) > _SHOWN else ""
    return f"{bytes(data[:_SHOWN])!r}{more}"

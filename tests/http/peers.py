"""Real programs as peers: started on loopback, awaited, and ended by their own process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

__all__ = ["command", "spawn", "text"]


@contextlib.asynccontextmanager
async def spawn(*argv: str | Path, ports: Sequence[int], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a server until the block ends; the block begins when it accepts on ``ports``. Its output goes to ``log``,
    and into the error if it ends early."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*map(str, argv), stdout=output, stderr=output)
    try:
        for port in ports:
            while not await _accepts(port):
                if process.returncode is not None:
                    raise RuntimeError(f"{argv[0]} ended with {process.returncode}: {text(log)}")
                await asyncio.sleep(0.05)
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def text(file: Path) -> str:
    """Return what a program has written to a file so far, "" if there is none yet."""
    return file.read_text(errors="replace") if file.exists() else ""


async def _accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return True


async def command(*argv: str | Path, input: bytes = b"") -> bytes:
    """Run a program to its end and return its output; a failure is an error with what it wrote."""
    process = await asyncio.create_subprocess_exec(
        *map(str, argv),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate(input)
    if process.returncode != 0:
        raise RuntimeError(f"{argv[0]} ended with {process.returncode}: {errors.decode()} {output[:500]!r}")
    return output

"""Processes that change one policy at the same time."""

from __future__ import annotations

import multiprocessing
import time
from ipaddress import IPv4Address
from multiprocessing.synchronize import Barrier

from rama_ebpf.cli.policy import call
from rama_ebpf.kernel.instance import Instance

__all__ = ["address", "block_at_once"]


def address(process: int, number: int) -> str:
    """The address that a process blocks with one of its calls."""
    return str(IPv4Address(0xC6120000 + process + 16 * number))  # from 198.18.0.0 on


def _block(instance: str, process: int, calls: int, together: Barrier) -> None:
    place = Instance(instance)
    together.wait(60)
    for number in range(calls):
        call(place, "add", {"source": address(process, number), "action": "drop"})


def block_at_once(instance: str, *, processes: int, calls: int) -> float:
    """Have each process make so many calls of ``block``, all as the command makes them; return seconds."""
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(processes + 1)
    started = [context.Process(target=_block, args=(instance, n, calls, together)) for n in range(processes)]
    for process in started:
        process.start()
    together.wait(60)
    begun = time.perf_counter()
    for process in started:
        process.join()
    seconds = time.perf_counter() - begun
    assert [process.exitcode for process in started] == [0] * processes
    return seconds

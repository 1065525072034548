from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from rama_ebpf.core.errors import Busy
from rama_ebpf.services.dns import system as module
from rama_ebpf.services.resolver import ResolveError, ResolveTimeout, SystemLookups, SystemResolver


@pytest.fixture
def slow_lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[str]]]:
    """Look-ups that hang until the event is set, as with a name server that does not answer."""
    release, asked = threading.Event(), []

    def getaddrinfo(name: str) -> list[object]:
        asked.append(name)
        release.wait()
        return [ip_address("198.18.0.1")]

    monkeypatch.setattr(module, "_getaddrinfo", getaddrinfo)
    yield release, asked
    release.set()


async def test_names_of_this_host_and_what_is_no_name() -> None:
    resolver = SystemResolver(threads=1)
    assert ip_address("127.0.0.1") in await resolver.resolve("localhost")
    with pytest.raises(ResolveError, match="not a valid domain name"):
        await resolver.resolve("a" * 64 + ".example")
    resolver.close()


async def test_callers_of_one_name_share_a_look_up(slow_lookups: tuple[threading.Event, list[str]]) -> None:
    release, asked = slow_lookups
    resolver = SystemResolver(threads=4)
    callers = [asyncio.create_task(resolver.resolve("a.example")) for _ in range(10)]
    await asyncio.sleep(0)
    callers[0].cancel()  # one that leaves takes nothing from the others
    release.set()
    await asyncio.gather(*callers[1:])
    assert asked == ["a.example"]
    resolver.close()


async def test_a_name_that_hangs_is_given_up_and_cannot_pile_up(
    slow_lookups: tuple[threading.Event, list[str]],
) -> None:
    release, asked = slow_lookups
    resolver = SystemResolver(threads=1, timeout=0.05, max_waiting=2)
    with pytest.raises(ResolveTimeout, match="no answer") as hung:
        await resolver.resolve("a.example")
    assert hung.value.temporary
    waiting = [asyncio.create_task(resolver.resolve(name)) for name in ("b.example", "c.example")]
    await asyncio.sleep(0)
    with pytest.raises(Busy, match=r"no room for 'd\.example'"):
        await resolver.resolve("d.example")
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, Busy), "their turn did not come: nobody has been asked"
    assert asked == ["a.example"]
    release.set()
    assert await resolver.resolve("e.example") == [ip_address("198.18.0.1")], "what nobody waited for is not looked up"
    assert asked == ["a.example", "e.example"]
    resolver.close()


async def test_names_that_hang_leave_half_of_the_threads_to_other_sources(
    slow_lookups: tuple[threading.Event, list[str]],
) -> None:
    release, asked = slow_lookups
    lookups = SystemLookups(threads=4, timeout=600)
    hanging = [lookups.look_up(f"hang{number}.example", "one") for number in range(50)]
    other = lookups.look_up("good.example", "another")
    await asyncio.sleep(0)
    release.set()
    assert await other.more() == [ip_address("198.18.0.1")]
    assert sorted(asked)[:3] == ["good.example", "hang0.example", "hang1.example"]
    for lookup in [*hanging, other]:
        lookup.__exit__()
    lookups.close()

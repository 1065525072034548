from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from rama_ebpf.services import resolver as module
from rama_ebpf.services.resolver import ResolveError, SystemResolver


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
    release, _ = slow_lookups
    resolver = SystemResolver(threads=1, timeout=0.05, max_waiting=2)
    for name in ("a.example", "b.example"):
        with pytest.raises(ResolveError, match="no answer") as hung:
            await resolver.resolve(name)
        assert hung.value.temporary
    with pytest.raises(ResolveError, match=r"no room for 'c\.example'"):
        await resolver.resolve("c.example")
    release.set()
    resolver.close()

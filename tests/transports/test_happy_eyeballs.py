"""Happy eyeballs on a real network: an address that never answers costs a moment, not a time-out."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

import pytest

from rama_ebpf.core import Authority, IPAddress, PolicyDenied
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import ConnectError, Connector

from ..namespace import network_namespace

EGRESS = EgressPolicy.of(["127.0.0.0/8", "::1/128", "198.18.0.0/15", "2001:db8::/32"])


class Fixed:
    def __init__(self, *addresses: str) -> None:
        self._addresses = [ip_address(text) for text in addresses]

    async def resolve(self, name: str) -> Sequence[IPAddress]:
        return self._addresses


@pytest.fixture
def swallowed() -> Iterator[None]:
    """198.18.4.9, 198.18.4.10 and 2001:db8:4::9 never answer."""
    with network_namespace(
        "link add swallow type veth peer name other",
        "link set swallow arp off up",
        "link set other up",
        "address add 198.18.4.1/24 dev swallow",
        "-6 address add 2001:db8:4::1/48 dev swallow nodad",
    ):
        yield


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.mark.root
@pytest.mark.parametrize("dead", [["2001:db8:4::9"], ["198.18.4.9", "2001:db8:4::9", "198.18.4.10"]])
async def test_address_that_never_answers_does_not_hold_up_the_next(swallowed, listener, dead):
    connector = Connector(Fixed(*dead, "127.0.0.1"), EGRESS, timeout=600, attempt_delay=0.05)
    async with asyncio.timeout(60):  # a tenth of what one attempt may take
        stream = await connector(Authority("target.test", listener.getsockname()[1]))
    assert str(stream.peer.ip) == "127.0.0.1"
    await stream.close()


@pytest.mark.root
async def test_attempts_that_lost_are_given_up(swallowed, listener):
    connector = Connector(Fixed("198.18.4.9", "127.0.0.1"), EGRESS, timeout=600, attempt_delay=0.05)
    stream = await connector(Authority("target.test", listener.getsockname()[1]))
    await stream.close()
    await asyncio.sleep(0)
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


@pytest.mark.root
async def test_cancelled_connect_gives_up_every_attempt(swallowed):
    connector = Connector(Fixed("198.18.4.9", "2001:db8:4::9"), EGRESS, timeout=600, attempt_delay=0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await connector(Authority("target.test", 80))
    await asyncio.sleep(0)
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_denied_addresses_are_never_dialled(listener):
    port = listener.getsockname()[1]
    only_v6 = EgressPolicy.of(["::1/128"])
    with pytest.raises(PolicyDenied):
        await Connector(Fixed("127.0.0.1", "10.0.0.1"), only_v6)(Authority("target.test", port))
    with pytest.raises(ConnectError) as caught:  # nothing listens on ::1, and 127.0.0.1 may not be tried
        await Connector(Fixed("127.0.0.1", "::1"), only_v6)(Authority("target.test", port))
    assert caught.value.errno == errno.ECONNREFUSED
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()

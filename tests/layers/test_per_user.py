"""What a user may do after authentication: bandwidth, targets, and passwords that user code looks up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import ip_address

import pytest

from rama_ebpf.core import (
    AuthFailed,
    Authority,
    Credentials,
    Extensions,
    PolicyDenied,
    SocketStream,
    Stream,
    User,
    stack,
)
from rama_ebpf.core.target import Target
from rama_ebpf.layers import PasswordTable, UserThrottleLayer
from rama_ebpf.layers.auth import hash_password
from rama_ebpf.policy import EgressPolicy
from rama_ebpf.services import UserEgressLayer
from rama_ebpf.services.resolver import SystemResolver

KB = 1024


def target(name: str | None, address: str = "127.0.0.1") -> Target:
    extensions = Extensions()
    if name is not None:
        extensions.add(User(name))
    return Target(ip_address(address), 80, extensions)


Dial = Callable[[Authority], Awaitable[Stream]]


@pytest.fixture
async def echoing() -> AsyncIterator[Dial]:
    """A connector to peers that send back what they get."""
    async with asyncio.TaskGroup() as peers:

        async def echo(sock: socket.socket) -> None:
            peer = SocketStream(sock)
            while data := await peer.read(64 * KB):
                await peer.write(data)
            await peer.close()

        async def dial(_target: Authority) -> Stream:
            ours, theirs = socket.socketpair()
            peers.create_task(echo(theirs))
            return SocketStream(ours)

        yield dial


async def move(stream: Stream, count: int) -> None:
    sending = asyncio.create_task(stream.write(bytes(count)))
    got = 0
    while got < count:
        got += len(await stream.read(64 * KB))
    await sending
    await stream.close()


async def test_connections_of_a_user_share_one_budget_and_others_have_none(echoing: Dial) -> None:
    asked: list[str] = []

    def rate(user: User) -> float | None:
        asked.append(user.name)
        return 256 * KB if user.name == "slow" else None

    connector = stack(UserThrottleLayer(rate), echoing)
    loop = asyncio.get_running_loop()
    streams = [await connector(target("slow")) for _ in range(2)]
    begun = loop.time()
    await asyncio.gather(*(move(stream, 96 * KB) for stream in streams))
    assert loop.time() - begun >= 0.45  # 64 KiB at once, 128 KiB at 256 KiB/s: no load makes that faster
    for name in ("quick", None):
        plain = await connector(target(name))
        assert isinstance(plain, SocketStream)
        await move(plain, 96 * KB)
    assert asked == ["slow", "slow", "quick"]


async def test_budgets_are_bounded_in_number_and_follow_a_new_rate(echoing: Dial) -> None:
    rates = {"a": 1e6, "b": 1e6, "c": 1e6}
    layer = UserThrottleLayer(lambda user: rates[user.name], users=2)
    connector = stack(layer, echoing)
    for name in rates:
        await (await connector(target(name))).close()
    assert list(layer._budgets) == ["b", "c"]
    rates["c"] = 5e6
    await (await connector(target("c"))).close()
    assert layer._budgets["c"][0] == 5e6


async def test_targets_are_judged_by_the_users_own_policy(echoing: Dial) -> None:
    policies = {"inside": EgressPolicy.of(allow=["127.0.0.1/32"], deny=["0.0.0.0/0", "::/0"])}
    connector = stack(UserEgressLayer(SystemResolver(), lambda user: policies.get(user.name)), echoing)
    for name, address in (("inside", "127.0.0.1"), ("free", "192.0.2.1"), (None, "192.0.2.1")):
        await (await connector(target(name, address))).close()
    with pytest.raises(PolicyDenied):
        await connector(target("inside", "192.0.2.1"))


async def test_password_hashes_are_looked_up_by_user_code_and_remembered_while_they_are_the_same() -> None:
    table = {"tom": hash_password("secret", (13, 1))}
    users = PasswordTable(
        lambda credentials: (table[credentials.username], User("Tom")) if credentials.username in table else None
    )
    for _ in range(2):
        assert await users(Credentials("tom", "secret")) == User("Tom")
    for name, password in (("tom", "guess"), ("nobody", "secret")):
        with pytest.raises(AuthFailed, match="unknown user or wrong password"):
            await users(Credentials(name, password))
    table["tom"] = hash_password("other", (13, 1))
    with pytest.raises(AuthFailed):
        await users(Credentials("tom", "secret"))
    assert await users(Credentials("tom", "other")) == User("Tom")

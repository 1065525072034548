from __future__ import annotations

import asyncio
import logging

import pytest

from rama_ebpf.core import AuthFailed, IPAddress, LimitExceeded, ProtocolError, Stream, stack
from rama_ebpf.layers.strikes import LocalStrikes, StrikeLayer, StrikeLimit, strike

from .conftest import Running, Serve, echo


class Bans:
    """Records bans the way a policy store would take them."""

    def __init__(self) -> None:
        self.made: list[tuple[str, float, str]] = []
        self.full = False

    async def ban(self, ip: IPAddress, /, *, ttl: float, reason: str) -> None:
        if self.full:
            raise OSError(7, "the map is full")
        self.made.append((str(ip), ttl, reason))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def misbehave(stream: Stream) -> None:
    raise ProtocolError("nonsense")


async def visit(server: Running, source: str, times: int = 1) -> None:
    for _ in range(times):
        client = await server.open(source)
        client.writer.close()
        await server.outcome()


async def test_the_nth_strike_within_the_window_bans_that_source_only(serve: Serve) -> None:
    bans, clock = Bans(), Clock()
    server = await serve(stack(StrikeLayer(LocalStrikes(bans, clock=clock), strikes=3, window=60, ban=600), misbehave))
    await visit(server, "127.0.1.1", 2)
    await visit(server, "127.0.1.2", 2)
    assert bans.made == []
    await visit(server, "127.0.1.1")
    assert bans.made == [("127.0.1.1", 600, "3 strikes, the last: protocol")]


async def test_strikes_outside_the_window_are_forgotten(serve: Serve) -> None:
    bans, clock = Bans(), Clock()
    server = await serve(stack(StrikeLayer(LocalStrikes(bans, clock=clock), strikes=2, window=60), misbehave))
    for moment in (0.0, 61.0, 122.0):
        clock.now = moment
        await visit(server, "127.0.1.1")
    assert bans.made == []
    clock.now = 130.0
    await visit(server, "127.0.1.1")
    assert len(bans.made) == 1


async def test_only_the_named_errors_are_strikes(serve: Serve) -> None:
    async def busy(stream: Stream) -> None:
        raise LimitExceeded("our limit, not their fault")

    bans = Bans()
    server = await serve(stack(StrikeLayer(LocalStrikes(bans), strikes=1), busy))
    await visit(server, "127.0.1.1")
    assert bans.made == []


async def test_a_protocol_can_strike_without_raising(serve: Serve) -> None:
    async def polite(stream: Stream) -> str:
        strike(stream.extensions, AuthFailed.kind)
        return await echo(stream)

    bans = Bans()
    server = await serve(stack(StrikeLayer(LocalStrikes(bans), strikes=1, ban=5), polite))
    assert await (await server.open("127.0.1.1")).ask(b"407") == b"407"
    assert bans.made == [("127.0.1.1", 5, "1 strikes, the last: auth_failed")]


async def test_a_ban_that_fails_is_an_error_line_and_tried_again(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    bans = Bans()
    bans.full = True
    server = await serve(stack(StrikeLayer(LocalStrikes(bans), strikes=1), misbehave))
    await visit(server, "127.0.1.1")
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        "a strike of 127.0.1.1 (protocol) did not count: [Errno 7] the map is full"
    ]
    bans.full = False
    await visit(server, "127.0.1.1")
    assert len(bans.made) == 1


async def test_remembered_sources_are_bounded(serve: Serve) -> None:
    strikes = LocalStrikes(Bans(), max_sources=2)
    server = await serve(stack(StrikeLayer(strikes), misbehave))
    for last in (1, 2, 3):
        await visit(server, f"127.0.1.{last}")
    assert len(strikes.book) == 2


async def test_ipv6_sources_are_counted_by_64() -> None:
    from ipaddress import ip_address

    from rama_ebpf.core import ClientAddress, Extensions, SocketAddress

    class Input:
        def __init__(self, ip: str) -> None:
            self.extensions = Extensions()
            self.extensions.add(ClientAddress(SocketAddress(ip_address(ip), 1)))

    async def fail(input: Input) -> None:
        raise ProtocolError("nonsense")

    bans = Bans()
    service = StrikeLayer(LocalStrikes(bans), strikes=2)(fail)
    await asyncio.gather(
        *(service(Input(ip)) for ip in ("2001:db8::1", "2001:db8:0:1::1", "2001:db8::2")), return_exceptions=True
    )
    assert [ip for ip, _, _ in bans.made] == ["2001:db8::2"]


@pytest.mark.parametrize(("values", "message"), [((0, 1, 1), "strikes must be"), ((1, 0, 1), "window and ban")])
def test_bad_limits_are_refused(values: tuple[int, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StrikeLimit(*values)

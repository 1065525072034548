"""Services and stacks over streams in memory: what a test of a user's says, and what it is told when that is wrong."""

from __future__ import annotations

import asyncio

import pytest

from rama_ebpf.core import (
    Authority,
    PeerClosed,
    ProtocolError,
    SocketAddress,
    Stream,
    client_address,
    local_address,
    stack,
)
from rama_ebpf.layers import TimeoutLayer
from rama_ebpf.relay import CloseReason
from rama_ebpf.services import ConnectError, Forward, HttpProxy, Socks5Server
from rama_ebpf.testing import Peer, Targets, serve, stream_pair


async def echo(stream: Stream) -> str:
    """Send back what comes, until EOF."""
    while data := await stream.read():
        await stream.write(data)
    return f"served {client_address(stream)} on {local_address(stream)}"


async def test_service_serves_a_client_that_it_knows_and_its_outcome_is_told() -> None:
    async with serve(echo) as served:
        await served.client.say(b"hello")
        await served.client.expect(b"hel")
        await served.client.expect(b"lo")
        await served.client.end()
        await served.client.expect_eof()
        assert await served.outcome() == "served 198.51.100.7:40000 on 192.0.2.1:1080"


async def test_tunnel_of_a_stack_ends_as_its_target_ends() -> None:
    targets = Targets()
    async with serve(
        stack(TimeoutLayer(handshake=60, idle=60), Forward(targets, Authority.of("a.example", 80)))
    ) as served:
        target = await targets.dialled()
        assert str(target.authority) == "a.example:80"
        await served.client.say(b"x" * 1_000_00)
        assert await target.peer.receive(65536) == b"x" * 65536
        await target.peer.say(b"bye")
        target.peer.reset()
        await served.client.expect_reset()
        assert (await served.outcome()).reason is not CloseReason.EOF


async def test_socks_server_and_http_proxy_reach_targets_of_the_test() -> None:
    targets = Targets()
    async with serve(Socks5Server(targets)) as served:
        await served.client.say(b"\x05\x01\x00\x05\x01\x00\x03\x09a.example\x00\x50")
        await served.client.expect(b"\x05\x00")
        target = await targets.dialled()
        assert str(target.authority) == "a.example:80"
        assert (await served.client.receive(10))[1] == 0
        await target.peer.say(b"hello")
        await target.peer.close()
        assert await served.client.receive_all() == b"hello"
    async with serve(HttpProxy(targets)) as served:
        await served.client.say(b"CONNECT b.example:443 HTTP/1.1\r\nHost: b.example:443\r\n\r\n")
        target = await targets.dialled()
        assert str(target.authority) == "b.example:443"
        assert (await served.client.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        await served.client.say(b"ping")
        await target.peer.expect(b"ping")


async def test_target_that_refuses_is_asked_and_the_client_told() -> None:
    targets = Targets(refuse=ConnectError("refused", Authority.of("a.example", 80)))
    async with serve(Socks5Server(targets)) as served:
        await served.client.say(b"\x05\x01\x00\x05\x01\x00\x03\x09a.example\x00\x50")
        await served.client.expect(b"\x05\x00\x05")
        assert (await served.client.receive(1)) != b"\x00"
    assert [str(asked) for asked in targets.asked] == ["a.example:80"]


async def test_service_that_raises_resets_its_client_and_a_bug_fails_the_test() -> None:
    async def strict(stream: Stream) -> None:
        raise ProtocolError("nonsense")

    async def broken(stream: Stream) -> None:
        raise KeyError("a bug")

    async with serve(strict) as served:  # an end that a server expects
        await served.client.expect_reset()
    async with serve(broken) as asked:
        with pytest.raises(KeyError, match="a bug"):
            await asked.outcome()
    with pytest.raises(KeyError, match="a bug"):
        async with serve(broken) as served:
            await served.client.expect_reset()
    with pytest.raises(AssertionError, match="in order") as failed:
        async with serve(broken) as served:
            await served.client.expect_eof()
    assert "the service raised KeyError('a bug')" in failed.value.__notes__


async def test_service_that_still_serves_is_cancelled_when_the_block_ends() -> None:
    ended = asyncio.Event()

    async def waits(stream: Stream) -> None:
        try:
            await stream.read()
        finally:
            ended.set()

    async with serve(waits, client=None, server=None, extensions=(SocketAddress,)) as served:
        await asyncio.sleep(0)
        assert served.stream.peer is None
    assert ended.is_set()


async def test_peer_says_what_came_in_place_of_what_was_expected() -> None:
    near, far = stream_pair()
    peer, hasty = Peer(near), Peer(near, patience=0.01)
    await far.write(b"HTTP/1.1 404")
    with pytest.raises(AssertionError, match=r"expected b'HTTP/1.1 200', but b'HTTP/1.1 404' came"):
        await peer.expect(b"HTTP/1.1 200")
    await far.write(b"abc")
    with pytest.raises(AssertionError, match=r"expected b'abcd', but only b'abc' came"):
        await hasty.expect(b"abcd")
    with pytest.raises(AssertionError, match="did not end within"):
        await hasty.expect_eof()
    with pytest.raises(AssertionError, match="was not reset within"):
        await hasty.expect_reset()
    with pytest.raises(AssertionError, match="does not read"):
        await hasty.say(b"x" * 100_000)
    await far.write(b"no end of line")
    await far.write_eof()
    with pytest.raises(AssertionError, match=r"after b'no end of line', without b'\\n'"):
        await peer.receive_until(b"\n")
    with pytest.raises(PeerClosed):
        await peer.receive(100)
    with pytest.raises(AssertionError, match="in order"):
        await peer.expect_reset()

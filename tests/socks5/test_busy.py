"""A server that has no time to check a password says so, and holds nothing against the client."""

from __future__ import annotations

import asyncio

from rama_ebpf.core import Busy, stack
from rama_ebpf.layers.strikes import LocalStrikes, StrikeLayer
from rama_ebpf.services.socks5 import Socks5Server

from .peers import exchange

LOGIN = b"\x05\x01\x02\x01\x03tom\x06secret"


class NoBans:
    async def ban(self, ip, /, *, ttl, reason):
        raise AssertionError(f"banned {ip}: {reason}")


async def test_busy_is_a_refusal_and_no_strike(run_proxy):
    async def busy(credentials):
        raise Busy("no time")

    proxy = await run_proxy(
        make=lambda connector: stack(StrikeLayer(LocalStrikes(NoBans()), strikes=1), Socks5Server(connector, auth=busy))
    )
    for _ in range(3):
        assert await exchange(proxy, LOGIN) == b"\x05\x02\x01\x01"
    await proxy.idle()
    assert {error.kind for error in proxy.errors} == {"busy"}


async def test_slow_checks_do_not_run_into_the_clients_time_out(run_proxy):
    async def slow(credentials):
        await asyncio.sleep(0.3)
        raise Busy("after all")

    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, auth=slow, handshake_timeout=0.1))
    assert await exchange(proxy, LOGIN) == b"\x05\x02\x01\x01"


async def test_a_check_ends_when_its_client_leaves(run_proxy):
    cancelled = asyncio.Event()

    async def for_ever(credentials):
        assert credentials.source is not None
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, auth=for_ever))
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    writer.write(LOGIN)
    await reader.readexactly(2)
    writer.close()
    await asyncio.wait_for(cancelled.wait(), 30)

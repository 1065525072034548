"""Passing TLS through by name: the client speaks with the target itself, and cannot tell the difference."""

from __future__ import annotations

import asyncio
import ssl

import pytest

from rama_ebpf.core import Authority, Stream, stack
from rama_ebpf.core.names import NameMap
from rama_ebpf.relay import TunnelReport
from rama_ebpf.services.connect import ConnectError, Connector
from rama_ebpf.services.tls import Alert, TlsPassthrough, TlsPeekLayer

from .conftest import HOST, Serve, TlsTarget
from .test_match import hello
from .test_peek import exchange


async def test_each_name_reaches_its_target_with_the_targets_own_certificate(
    serve: Serve, tls_target: TlsTarget, connector: Connector, trust: ssl.SSLContext
) -> None:
    names = ("a.test", "b.test", "c.test")
    targets = NameMap([(name, Authority(name, await tls_target(name))) for name in names])
    running = serve(stack(TlsPeekLayer(), TlsPassthrough(connector, targets=targets)))
    payload = bytes(range(256)) * 4096
    for name in names:
        reader, writer = await asyncio.open_connection(HOST, running.port, ssl=trust, server_hostname=name)
        assert await reader.readline() == f"{name}\n".encode()
        writer.write(payload)
        assert await reader.readexactly(len(payload)) == payload
        writer.close()
        await writer.wait_closed()
    await running.idle()
    reports = [result for result in running.results if isinstance(result, TunnelReport)]
    assert [report.to_upstream > len(payload) for report in reports] == [True] * 3
    assert {report.relay for report in reports} <= {"splice", "sockmap"}, "the bytes pass in the kernel"


@pytest.mark.parametrize("behind", [0, 1, 100, 30_000])
async def test_what_comes_with_the_hello_and_a_fin_behind_it_reach_the_target(
    serve: Serve, connector: Connector, behind: int
) -> None:
    """In one segment or one byte a segment; and the target's answer comes back after the client's FIN."""

    async def target(stream: Stream) -> bytes:
        got = b""
        while part := await stream.read():
            got += part
        await stream.write(b"answer" * 5000)
        return got

    upstream = serve(target)
    running = serve(stack(TlsPeekLayer(), TlsPassthrough(connector, port=upstream.port)))
    sent = hello(b"a.test") + b"\x17\x03\x03" + bytes(behind)
    assert await exchange(running, sent) == b"answer" * 5000
    assert upstream.results == [sent]
    reader, writer = await running.connect()
    writer.transport.set_write_buffer_limits(0)
    for byte in sent[:200]:
        writer.write(bytes((byte,)))
        await writer.drain()
        await asyncio.sleep(0)
    writer.write(sent[200:])
    writer.write_eof()
    assert await reader.read() == b"answer" * 5000
    writer.close()
    assert upstream.results == [sent, sent]


async def test_a_name_without_a_target_is_the_target_itself(
    serve: Serve, tls_target: TlsTarget, connector: Connector, trust: ssl.SSLContext
) -> None:
    port = await tls_target("self.test")
    running = serve(stack(TlsPeekLayer(), TlsPassthrough(connector, port=port)))
    reader, writer = await asyncio.open_connection(HOST, running.port, ssl=trust, server_hostname="self.test")
    assert await reader.readline() == b"self.test\n"
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_names_no_server_goes_where_it_is_told_or_gets_an_alert(
    serve: Serve, tls_target: TlsTarget, connector: Connector
) -> None:
    refusing = serve(stack(TlsPeekLayer(), TlsPassthrough(connector)))
    assert await exchange(refusing, hello(None)) == Alert.UNRECOGNIZED_NAME.record
    listed = serve(stack(TlsPeekLayer(), TlsPassthrough(connector, port=None)))
    assert await exchange(listed, hello(b"a.test")) == Alert.UNRECOGNIZED_NAME.record
    fixed = Authority("a.test", await tls_target("a.test"))
    running = serve(stack(TlsPeekLayer(), TlsPassthrough(connector, no_sni=fixed)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(HOST, running.port, ssl=context, server_hostname="")
    assert await reader.readline() == b"a.test\n"
    writer.close()
    await writer.wait_closed()


async def test_an_unreachable_target_cuts_the_client(serve: Serve, connector: Connector) -> None:
    listener = await asyncio.start_server(lambda _reader, _writer: None, HOST, 0)
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    running = serve(stack(TlsPeekLayer(), TlsPassthrough(connector, port=port)))
    with pytest.raises(ConnectionResetError):
        await exchange(running, hello(b"a.test"))
    await running.idle()
    assert [type(error) for error in running.errors] == [ConnectError]

"""The forward proxy, by the exact bytes on both of its sides."""

from __future__ import annotations

import asyncio

import pytest

from rama_ebpf.core import Authority, Stream
from rama_ebpf.services.http import HttpProxy, HttpTimeouts, PoolLimits

from .conftest import (
    DATE,
    OK,
    OK_VIA,
    Connect,
    Origin,
    Run,
    RunOrigin,
    Server,
    abort,
    descriptors,
    eventually,
    nobody,
    read_until_reset,
)


@pytest.fixture
async def proxy(run: Run, connector: Connect) -> Server:
    return run(HttpProxy(connector))


def get(origin: Origin, *fields: bytes, method: bytes = b"GET", path: bytes = b"/x?y=1") -> bytes:
    target = b"http://" + origin.host + path
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: " + origin.host, *fields, b"", b""]
    return b"\r\n".join(lines)


async def test_absolute_target_becomes_origin_form_with_its_host_and_both_ways_carry_via(
    proxy: Server, run_origin: RunOrigin
) -> None:
    origin = run_origin(OK)
    answer = await proxy.exchange(get(origin, b"Connection: close", b"X-Custom: 1"))
    assert origin.requests == [
        b"GET /x?y=1 HTTP/1.1\r\nHost: " + origin.host + b"\r\nX-Custom: 1\r\nVia: 1.1 rama-ebpf\r\n\r\n"
    ]
    assert answer == OK_VIA.replace(b"Content-Length: 2\r\n", b"Content-Length: 2\r\nConnection: close\r\n")


async def test_host_field_that_contradicts_the_target_is_replaced(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    await proxy.exchange(b"GET http://" + origin.host + b"/ HTTP/1.1\r\nHost: other.test\r\nConnection: close\r\n\r\n")
    assert origin.requests == [b"GET / HTTP/1.1\r\nHost: " + origin.host + b"\r\nVia: 1.1 rama-ebpf\r\n\r\n"]


async def test_http_1_0_client_is_served_and_marked_as_such(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(b"HTTP/1.1 200 OK\r\n" + DATE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    answer = await proxy.exchange(b"GET http://" + origin.host + b"/ HTTP/1.0\r\n\r\n")
    assert origin.requests == [b"GET / HTTP/1.1\r\nHost: " + origin.host + b"\r\nVia: 1.0 rama-ebpf\r\n\r\n"]
    assert answer == b"HTTP/1.1 200 OK\r\n" + DATE + b"Via: 1.1 rama-ebpf\r\nConnection: close\r\n\r\nabc"


async def test_hop_by_hop_and_nominated_fields_are_removed_both_ways(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Connection: X-Hop, Keep-Alive\r\nKeep-Alive: timeout=5\r\nX-Hop: secret\r\n"
        b"Proxy-Connection: keep-alive\r\nProxy-Authenticate: Basic\r\nUpgrade: h2c\r\nX-End: 1\r\n"
        b"Content-Length: 2\r\n\r\nok"
    )
    answer = await proxy.exchange(
        get(
            origin,
            b"Connection: close, X-Private",
            b"X-Private: 1",
            b"Keep-Alive: timeout=9",
            b"Proxy-Connection: keep-alive",
            b"Proxy-Authorization: Basic c2VjcmV0",
            b"TE: gzip",
            b"Upgrade: h2c",
            b"HTTP2-Settings: AAMAAABkAAQAAP__",
            b"Authorization: Bearer t",
        )
    )
    assert origin.requests == [
        b"GET /x?y=1 HTTP/1.1\r\nHost: " + origin.host + b"\r\nAuthorization: Bearer t\r\nVia: 1.1 rama-ebpf\r\n\r\n"
    ]
    assert answer == (
        b"HTTP/1.1 200 OK\r\n" + DATE + b"X-End: 1\r\nVia: 1.1 rama-ebpf\r\nContent-Length: 2\r\n"
        b"Connection: close\r\n\r\nok"
    )


async def test_client_and_upstream_connections_are_kept_and_used_again(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    reader, writer = await proxy.open()
    for _ in range(3):
        writer.write(get(origin))
        assert await reader.readexactly(len(OK_VIA)) == OK_VIA
    writer.close()
    assert (len(origin.requests), origin.connections, proxy.tcp.accepted) == (3, 1, 1)


async def test_pipelined_requests_are_answered_in_order(proxy: Server, run_origin: RunOrigin) -> None:
    replies = [OK.replace(b"ok", text) for text in (b"r1", b"r2", b"r3")]
    origin = run_origin(*replies)
    answer = await proxy.exchange(get(origin) + get(origin) + get(origin, b"Connection: close"))
    assert [answer.index(text) for text in (b"r1", b"r2", b"r3")] == sorted(
        answer.index(text) for text in (b"r1", b"r2", b"r3")
    )


async def test_a_kept_connection_that_the_origin_closed_does_not_fail_the_next_request(
    proxy: Server, run_origin: RunOrigin
) -> None:
    origin = run_origin(OK, close=True)
    reader, writer = await proxy.open()
    for _ in range(5):
        writer.write(get(origin))
        assert await reader.readexactly(len(OK_VIA)) == OK_VIA
    writer.close()


async def test_bytes_behind_a_response_are_never_taken_for_the_next_one(proxy: Server, run_origin: RunOrigin) -> None:
    poison = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
    origin = run_origin(OK + poison, OK)
    for _ in range(2):
        assert b"poison" not in await proxy.exchange(get(origin, b"Connection: close"))
    assert origin.connections == 2


async def test_request_body_by_length_arrives_with_the_same_framing(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(OK, until=b"hello")
    await proxy.exchange(get(origin, b"Connection: close", b"Content-Length: 5", method=b"POST") + b"hello")
    assert origin.requests[0].endswith(b"Via: 1.1 rama-ebpf\r\nContent-Length: 5\r\n\r\nhello")


async def test_chunked_request_with_trailers_arrives_chunked_without_extensions(
    proxy: Server, run_origin: RunOrigin
) -> None:
    origin = run_origin(OK, until=b"X-Sum: 7\r\n\r\n")
    body = b"5;name=v\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 7\r\n\r\n"
    await proxy.exchange(
        get(origin, b"Connection: close", b"Transfer-Encoding: chunked", b"Trailer: X-Sum", method=b"POST") + body
    )
    assert origin.requests[0].endswith(
        b"Trailer: X-Sum\r\nVia: 1.1 rama-ebpf\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"b\r\nhello world\r\n0\r\nX-Sum: 7\r\n\r\n"
    )


async def test_response_trailers_reach_a_client_that_accepts_them_and_no_other(
    proxy: Server, run_origin: RunOrigin
) -> None:
    origin = run_origin(
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n"
    )
    head = (
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Via: 1.1 rama-ebpf\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    answer = await proxy.exchange(get(origin, b"TE: trailers", b"Connection: TE, close"))
    assert answer == head + b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n"
    assert b"TE: trailers\r\nConnection: TE\r\n" in origin.requests[0]
    answer = await proxy.exchange(get(origin, b"Connection: close"))
    assert answer == head + b"3\r\nabc\r\n0\r\n\r\n"


async def test_100_continue_is_the_origins_and_the_body_waits_for_it(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(b"HTTP/1.1 100 Continue\r\n\r\n", OK, until=[b"\r\n\r\n", b"hello"])
    reader, writer = await proxy.open()
    writer.write(get(origin, b"Content-Length: 5", b"Expect: 100-continue", method=b"PUT"))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert origin.requests[0].endswith(b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
    writer.write(b"hello")
    assert await reader.readexactly(len(OK_VIA)) == OK_VIA
    assert origin.requests[1] == b"hello"
    writer.close()


async def test_a_refusal_instead_of_100_continue_ends_the_request_unsent(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(b"HTTP/1.1 417 No\r\n" + DATE + b"Content-Length: 0\r\n\r\n")
    answer = await proxy.exchange(get(origin, b"Content-Length: 5", b"Expect: 100-continue", method=b"PUT"))
    assert answer == (
        b"HTTP/1.1 417 No\r\n" + DATE + b"Via: 1.1 rama-ebpf\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )


async def test_no_100_continue_follows_a_final_response(run: Run, connector: Connect) -> None:
    async def refuses_slowly(stream: Stream) -> None:
        await stream.read()
        await stream.write(b"HTTP/1.1 403 No\r\n" + DATE + b"Transfer-Encoding: chunked\r\n\r\n2\r\nno\r\n")
        await asyncio.sleep(0.3)
        await stream.write(b"0\r\n\r\n")

    proxy = run(HttpProxy(connector, timeouts=HttpTimeouts(expect_continue=0.1)))
    origin = Origin(run(refuses_slowly).port, [], [], False)
    answer = await proxy.exchange(get(origin, b"Content-Length: 5", b"Expect: 100-continue", method=b"PUT"))
    assert answer.startswith(b"HTTP/1.1 403 No\r\n")
    assert answer.endswith(b"\r\n\r\n2\r\nno\r\n0\r\n\r\n")


async def test_interim_responses_are_passed_on(proxy: Server, run_origin: RunOrigin) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n"
    origin = run_origin(hints + OK)
    reader, writer = await proxy.open()
    writer.write(get(origin))
    assert await reader.readexactly(len(hints)) == hints
    assert await reader.readexactly(len(OK_VIA)) == OK_VIA
    writer.close()


async def test_head_keeps_the_length_that_get_would_have(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Length: 12345\r\n\r\n")
    answer = await proxy.exchange(get(origin, b"Connection: close", method=b"HEAD"))
    assert answer == (
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Via: 1.1 rama-ebpf\r\nContent-Length: 12345\r\nConnection: close\r\n\r\n"
    )


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_a_response_without_a_body_leaves_the_connection_usable(
    proxy: Server, run_origin: RunOrigin, status: bytes
) -> None:
    origin = run_origin(b"HTTP/1.1 " + status + b"\r\n" + DATE + b"\r\n", OK)
    reader, writer = await proxy.open()
    writer.write(get(origin))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 " + status + b"\r\n" + DATE + b"Via: 1.1 rama-ebpf\r\n\r\n"
    writer.write(get(origin))
    assert await reader.readexactly(len(OK_VIA)) == OK_VIA
    writer.close()


async def test_a_body_that_ends_with_the_connection_is_framed_for_the_client(
    proxy: Server, run_origin: RunOrigin
) -> None:
    origin = run_origin(b"HTTP/1.0 200 OK\r\n" + DATE + b"\r\nold style", close=True)
    reader, writer = await proxy.open()
    writer.write(get(origin))
    assert await reader.readuntil(b"0\r\n\r\n") == (
        b"HTTP/1.1 200 OK\r\n" + DATE + b"Via: 1.0 rama-ebpf\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"9\r\nold style\r\n0\r\n\r\n"
    )
    writer.close()


@pytest.mark.parametrize(
    ("method", "limit", "arrives"), [(b"OPTIONS", b"1", b"0"), (b"TRACE", b"1", b"0"), (b"GET", b"1", b"1")]
)
async def test_max_forwards_is_counted_down_for_options_and_trace_only(
    proxy: Server, run_origin: RunOrigin, method: bytes, limit: bytes, arrives: bytes
) -> None:
    origin = run_origin(OK)
    await proxy.exchange(get(origin, b"Connection: close", b"Max-Forwards: " + limit, method=method))
    assert b"Max-Forwards: " + arrives + b"\r\n" in origin.requests[0]


async def test_max_forwards_0_is_answered_here_without_secrets(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    answer = await proxy.exchange(
        get(origin, b"Connection: close", b"Max-Forwards: 0", b"Cookie: s", b"Authorization: a", method=b"TRACE")
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: message/http\r\n")
    assert body == (
        b"TRACE http://" + origin.host + b"/x?y=1 HTTP/1.1\r\nHost: " + origin.host + b"\r\nMax-Forwards: 0\r\n\r\n"
    )
    answer = await proxy.exchange(get(origin, b"Connection: close", b"Max-Forwards: 0", method=b"OPTIONS"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\nAllow: GET, ")
    assert origin.requests == []


async def test_options_of_a_server_is_sent_in_asterisk_form(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    await proxy.exchange(get(origin, b"Connection: close", method=b"OPTIONS", path=b""))
    assert origin.requests[0].startswith(b"OPTIONS * HTTP/1.1\r\nHost: ")


async def test_a_loop_ends_with_508(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    via = b"Via: " + b", ".join([b"1.1 rama-ebpf"] * 32)
    answer = await proxy.exchange(get(origin, b"Connection: close", via))
    assert answer.startswith(b"HTTP/1.1 508 Loop Detected\r\n")
    assert b"Proxy-Status: rama-ebpf; error=proxy_loop_detected\r\n" in answer


async def test_connect_joins_both_sides_and_nothing_sent_early_is_lost(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(b"hello client", until=b"hello server", close=True)
    answer = await proxy.exchange(
        b"CONNECT " + origin.host + b" HTTP/1.1\r\nHost: " + origin.host + b"\r\n\r\nhello server"
    )
    head, _, tunnelled = answer.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"HTTP/1.1 200 OK"
    assert b"content-length" not in head.lower()
    assert b"transfer-encoding" not in head.lower()
    assert tunnelled == b"hello client"
    assert origin.requests == [b"hello server"]


async def test_failures_of_the_upstream_are_told_apart(run: Run, connector: Connect, run_origin: RunOrigin) -> None:
    proxy = run(HttpProxy(connector, timeouts=HttpTimeouts(response=0.2)))

    async def status(request: bytes) -> tuple[bytes, bytes]:
        answer = await proxy.exchange(request)
        status_line, *fields = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")
        proxy_status = [field for field in fields if field.startswith(b"Proxy-Status")]
        return status_line.split()[1], proxy_status[0].rpartition(b"=")[2]

    def to(authority: str) -> bytes:
        return f"GET http://{authority}/ HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n".encode()

    dead = await nobody()
    silent = run_origin(b"")
    rude = run_origin(b"", close=True)
    babbling = run_origin(b"220 smtp.test ESMTP\r\n\r\n")
    assert await status(to(f"127.0.0.1:{dead}")) == (b"502", b"connection_refused")
    assert await status(to("nowhere.test")) == (b"502", b"dns_error")
    assert await status(to("late.test")) == (b"504", b"dns_timeout")
    assert await status(to("10.0.0.1")) == (b"403", b"destination_ip_prohibited")
    assert await status(to(silent.authority)) == (b"504", b"http_response_timeout")
    assert await status(to(rude.authority)) == (b"502", b"connection_terminated")
    assert await status(to(babbling.authority)) == (b"502", b"http_protocol_error")
    assert await status(f"CONNECT 127.0.0.1:{dead} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()) == (
        b"502",
        b"connection_refused",
    )


async def test_a_refused_connect_keeps_the_connection(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    reader, writer = await proxy.open()
    writer.write(f"CONNECT 127.0.0.1:{await nobody()} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
    length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
    await reader.readexactly(length)
    writer.write(get(origin))
    assert await reader.readexactly(len(OK_VIA)) == OK_VIA
    writer.close()


async def test_a_response_that_breaks_off_is_reset_and_never_looks_complete(
    proxy: Server, run_origin: RunOrigin
) -> None:
    for reply in (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhel",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\nnonsense\r\n",
    ):
        origin = run_origin(reply, close=True)
        reader, writer = await proxy.open()
        writer.write(get(origin))
        assert not (await read_until_reset(reader)).endswith(b"0\r\n\r\n")
        writer.close()


async def test_unasked_100_of_the_origin_is_passed_on(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)  # RFC 9110 section 15.2: 1xx are forwarded
    answer = await proxy.exchange(get(origin, b"Connection: close"))
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


async def test_client_that_resets_ends_the_request_upstream(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(b"")  # takes the request and never answers
    before = descriptors()
    reader, writer = await proxy.open()
    writer.write(get(origin))
    await origin.arrived.wait()
    abort(writer)
    del reader
    await eventually(lambda: proxy.tcp.live == 0)
    await eventually(lambda: descriptors() <= before)


@pytest.mark.parametrize("chooses", [False, True])
async def test_connections_are_shared_between_clients_unless_the_connector_may_choose_by_the_client(
    run: Run, connector: Connect, run_origin: RunOrigin, chooses: bool
) -> None:
    async def choosing(target: Authority) -> Stream:
        return await connector(target)

    proxy = run(HttpProxy(choosing if chooses else connector))
    origin = run_origin(OK)
    for _ in range(3):
        reader, writer = await proxy.open()
        for _ in range(2):
            writer.write(get(origin))
            assert await reader.readexactly(len(OK_VIA)) == OK_VIA
        writer.close()
        await proxy.idle()
    assert origin.connections == (3 if chooses else 1)


async def test_users_on_one_connection_do_not_share_where_the_connector_may_choose(
    run: Run, connector: Connect, run_origin: RunOrigin
) -> None:
    async def choosing(target: Authority) -> Stream:
        return await connector(target)

    proxy = run(HttpProxy(choosing))
    origin = run_origin(OK)
    reader, writer = await proxy.open()
    for user in (b"YQ==", b"Yg==", b"YQ=="):
        writer.write(get(origin, b"Proxy-Authorization: Basic " + user))
        assert await reader.readexactly(len(OK_VIA)) == OK_VIA
    writer.close()
    assert origin.connections == 2


async def test_idle_upstream_connections_are_bounded_and_closed(
    run: Run, connector: Connect, run_origin: RunOrigin
) -> None:
    service = HttpProxy(connector, pool_limits=PoolLimits(idle_per_origin=2, keep=0.2))
    proxy = run(service)
    origin = run_origin(OK)
    before = descriptors()
    await asyncio.gather(*(proxy.exchange(get(origin, b"Connection: close")) for _ in range(8)))
    assert service.proxy.pool.idle <= 2
    await eventually(lambda: service.proxy.pool.idle == 0)
    await eventually(lambda: descriptors() <= before)


async def test_draining_closes_idle_connections_and_lets_a_request_finish(run: Run, connector: Connect) -> None:
    arrived, released = asyncio.Event(), asyncio.Event()

    async def slow(stream: Stream) -> None:
        await stream.read()
        arrived.set()
        await released.wait()
        await stream.write(OK)

    service = HttpProxy(connector)
    proxy = run(service)
    origin = Origin(run(slow).port, [], [], False)
    idle_reader, idle_writer = await proxy.open()
    reader, writer = await proxy.open()
    writer.write(get(origin))
    await arrived.wait()
    service.drain()
    assert await idle_reader.read() == b""
    released.set()
    assert (await reader.read()).endswith(b"Connection: close\r\n\r\nok")
    await proxy.idle()
    writer.close()
    idle_writer.close()


async def test_origin_form_to_a_forward_proxy_is_refused(proxy: Server) -> None:
    answer = await proxy.exchange(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_bytes_fed_one_by_one_are_read_the_same(proxy: Server, run_origin: RunOrigin) -> None:
    origin = run_origin(OK, until=b"0\r\n\r\n")
    request = get(origin, b"Connection: close", b"Transfer-Encoding: chunked", method=b"POST")
    request += b"5;a=b\r\nhello\r\n1\r\n!\r\n0\r\n\r\n"
    answer = await proxy.exchange(*(request[index : index + 1] for index in range(len(request))))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert origin.requests[0].endswith(b"0\r\n\r\n")

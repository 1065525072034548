"""One access line a request: who asked whom for what, and why it ended; and the requests that are running now."""

from __future__ import annotations

import asyncio
import base64
import logging

import h2.events
import pytest

from rama_ebpf.core import Service, Stream, stack
from rama_ebpf.core.request_log import RequestRecord
from rama_ebpf.layers.access_log import AccessLogLayer, AccessRecord
from rama_ebpf.layers.auth import StaticUsers
from rama_ebpf.relay import tunnels
from rama_ebpf.services.http import HttpProxy, HttpServer, Request, Response
from rama_ebpf.services.http.exchange.running import running
from rama_ebpf.services.http.layers import ProxyAuthLayer

from .conftest import OK, Connect, Run, RunOrigin, Server, abort, eventually, nobody
from .h2_client import GET, h2_client

TOM = b"Proxy-Authorization: Basic " + base64.b64encode(b"tom:secret")
EVE = b"Proxy-Authorization: Basic " + base64.b64encode(b"eve:guess")


class Log:
    """The records of requests, and of connections."""

    def __init__(self) -> None:
        self.requests: list[RequestRecord] = []
        self.connections: list[AccessRecord] = []

    def around(self, service: Service[Stream, object]) -> Service[Stream, object]:
        return stack(AccessLogLayer(self.connections.append, request_sink=self.requests.append), service)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def proxy(run: Run, connector: Connect, log: Log) -> Server:
    users = ProxyAuthLayer(StaticUsers({"tom": "secret"}))
    return run(
        log.around(HttpProxy(connector, layers=[users], connect_ports=[*range(1, 60_000), *range(60_001, 65_536)]))
    )


def get(target: str, *fields: bytes, method: bytes = b"GET") -> bytes:
    head = [method + b" " + target.encode() + b" HTTP/1.1", b"Host: a.test", *fields]
    return b"\r\n".join([*head, b"", b""])


async def test_each_request_of_a_kept_connection_has_one_line_with_all_that_an_operator_asks(
    proxy: Server, run_origin: RunOrigin, log: Log
) -> None:
    origin = run_origin(OK)
    reader, writer = await proxy.open()
    for number in range(3):
        writer.write(get(f"http://{origin.authority}/path{number}?token=s3cret#"[:-1], TOM))
        await reader.readuntil(b"ok")
    writer.close()
    await proxy.idle()
    assert log.connections == []
    assert len(log.requests) == 3
    client = writer.get_extra_info("sockname")[1]
    for number, record in enumerate(log.requests):
        assert str(record.client) == f"127.0.0.1:{client}"
        assert str(record.listener) == proxy.authority
        assert (record.user, record.method, record.status, record.reason) == ("tom", "GET", 200, "done")
        assert record.target == f"http://{origin.authority}/path{number}"
        assert record.upstream is not None
        assert str(record.upstream.address) == origin.authority
        assert record.upstream.kept == (number > 0)
        assert record.received > 100
        assert record.sent > len(OK)
        assert record.first_byte is not None
        assert 0 <= record.first_byte <= record.total
        assert "s3cret" not in str(record)
    line = str(log.requests[1])
    assert line.startswith(f"client=127.0.0.1:{client} listener={proxy.authority} user=tom method=GET target=http://")
    assert f" status=200 upstream={origin.authority} kept=yes reason=done received=" in line


async def test_a_refusal_says_why_and_not_done(proxy: Server, run_origin: RunOrigin, log: Log) -> None:
    origin = run_origin(OK)
    dead = await nobody()
    wanted = [
        (get(f"http://{origin.authority}/"), 407, "auth_absent", ""),
        (get(f"http://{origin.authority}/", EVE), 407, "auth_failed", ""),
        (get("http://10.0.0.1/", TOM), 403, "policy_denied", "10.0.0.1"),
        (get("127.0.0.1:60000", TOM, method=b"CONNECT"), 403, "http_403", "port"),
        (get(f"http://127.0.0.1:{dead}/", TOM), 502, "connect", f"127.0.0.1:{dead}: Connection refused"),
        (get("http://nowhere.test/", TOM), 502, "resolve", "nowhere.test"),
        (get("/", TOM), 400, "http_400", "absolute"),
    ]
    for request, status, _, internals in wanted:
        answer = await proxy.exchange(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        if status == 502:
            assert internals.encode() not in answer  # the log is told more than the client
    assert log.connections == []
    assert [(record.status, record.reason) for record in log.requests] == [row[1:3] for row in wanted]
    for record, (_, _, _, text) in zip(log.requests, wanted, strict=True):
        assert text in record.error
        assert record.target
    assert [record.user for record in log.requests] == ["", "", *["tom"] * 5]


async def test_a_502_names_the_upstream_and_the_reason(proxy: Server, run_origin: RunOrigin, log: Log) -> None:
    origin = run_origin(b"220 smtp.test ESMTP\r\n\r\n")
    answer = await proxy.exchange(get(f"http://{origin.authority}/", TOM, b"Connection: close"))
    assert b"status line" not in answer
    (record,) = log.requests
    assert (record.status, record.reason) == (502, "http_protocol_error")
    assert record.upstream is not None
    assert str(record.upstream.address) == origin.authority
    assert "not a status line" in record.error


async def test_a_tunnel_has_one_line_at_its_end(proxy: Server, run_origin: RunOrigin, log: Log) -> None:
    origin = run_origin(b"hello client", until=b"hello server", close=True)
    await proxy.exchange(get(origin.authority, TOM, method=b"CONNECT") + b"hello server", eof=True)
    await proxy.idle()
    assert log.connections == []
    (record,) = log.requests
    assert (record.method, record.target, record.status) == ("CONNECT", origin.authority, 200)
    assert (record.user, record.reason) == ("tom", "eof")
    assert record.relay
    assert record.sent >= 12


async def test_a_client_that_goes_and_a_message_that_is_none_have_their_line(
    proxy: Server, run_origin: RunOrigin, log: Log
) -> None:
    origin = run_origin(b"")
    _, writer = await proxy.open()
    writer.write(get(f"http://{origin.authority}/", TOM))
    await origin.arrived.wait()
    abort(writer)
    await proxy.idle()
    (record,) = log.requests
    assert (record.status, record.reason) == (0, "peer_closed")
    await proxy.exchange(b"GET / HTTP/1.1\r\nHost : a\r\n\r\n")
    await proxy.idle()
    assert [record.reason for record in log.connections] == ["http_refused"]
    assert len(log.requests) == 1


async def test_requests_over_http_2_have_lines_of_their_own(run: Run, log: Log) -> None:
    async def app(request: Request) -> Response:
        return Response.text(200, str(len(await request.body.read(100))))

    server = run(log.around(HttpServer(app, h2c=True)))
    async with h2_client(server.port) as client:
        ids = []
        for _ in range(2):
            ids.append(client.request([*GET, ("x", "1")], end=False))
            client.h2.send_data(ids[-1], b"hello", end_stream=True)
        for asked in ids:
            await client.until(h2.events.StreamEnded, asked)
    await server.idle()
    assert log.connections == []
    assert [(record.target, record.status, record.received, record.sent) for record in log.requests] == [
        ("http://a.test/", 200, 5, 1)
    ] * 2


async def test_running_requests_and_tunnels_are_shown_with_their_users(proxy: Server, run_origin: RunOrigin) -> None:
    silent = run_origin(b"")
    _, writer = await proxy.open()
    writer.write(get(f"http://{silent.authority}/slow?token=s3cret", TOM))
    await silent.arrived.wait()
    await eventually(lambda: len(running) == 1)
    (shown,) = running
    assert (shown.user, shown.relay, shown.why) == ("tom", "http", f"GET http://{silent.authority}/slow")
    assert str(shown.target) == silent.authority
    assert shown.as_json()["user"] == "tom"
    reader, other = await proxy.open()
    echo = run_origin(b"x", until=b"never")
    other.write(get(echo.authority, TOM, method=b"CONNECT"))
    await reader.readuntil(b"\r\n\r\n")
    await eventually(lambda: len(list(tunnels)) == 1)
    assert [flow.user for flow in tunnels] == ["tom"]
    assert len(running) == 1
    abort(writer)
    abort(other)
    await proxy.idle()
    assert len(running) == 0


async def test_a_target_of_16_kib_does_not_make_a_line_of_16_kib(
    run: Run, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(request: Request) -> Response:
        return Response.text(200, "ok")

    caplog.set_level(logging.INFO, "rama_ebpf.access")
    server = run(stack(AccessLogLayer(), HttpServer(app)))
    await server.exchange(get("/" + "a" * 10_000, b"Connection: close"))
    await asyncio.sleep(0)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "rama_ebpf.access"]
    assert len(line) < 1200

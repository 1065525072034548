"""Requests are counted by route, in callbacks and in coroutines alike, and nobody outside chooses the names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import REGISTRY

from rama_ebpf.core import Authority, Service, Stream, stack
from rama_ebpf.core.request_log import RequestMeter
from rama_ebpf.layers import AddExtensionLayer, MetricsLayer
from rama_ebpf.services.http import HttpProxy, HttpServer, Route, Routes

from .conftest import OK, MakePool, Origin, Run, eventually, nobody

RunOrigin = Callable[..., Origin]
Connect = Service[Authority, Stream]


def counted(meter: RequestMeter) -> dict[str, dict[int, int]]:
    return {
        route: {digit: number for digit, number in enumerate(count.statuses) if number}
        for route, count in meter.take().items()
    }


async def test_each_request_counts_for_its_route_whichever_way_it_went(
    run: Run, pool_of: MakePool, run_origin: RunOrigin
) -> None:
    pool = pool_of(run_origin(OK).port)
    broken = pool_of(await nobody())
    routes = Routes([Route(pool, path="/api", name="the api"), Route(broken, host="a.test", path="/down")])
    begun: list[None] = []
    meter = RequestMeter(lambda: begun.append(None))
    server = run(stack(AddExtensionLayer(meter), HttpServer(routes)))
    reader, writer = await server.open()
    for path, status in (
        (b"/api", b"200"),
        (b"/api/x", b"200"),
        (b"/api?secret", b"200"),
        (b"/down", b"502"),
        (b"/", b"404"),
    ):
        writer.write(b"GET %b HTTP/1.1\r\nHost: a.test\r\n\r\n" % path)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status)
        await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0]))
    await eventually(lambda: sum(sum(count.statuses) for count in meter._routes.values()) == 5)
    assert len(begun) == 1
    assert counted(meter) == {"the api": {2: 3}, "a.test/down": {5: 1}, "none": {4: 1}}
    writer.close()


async def test_a_forward_proxys_targets_are_no_routes(run: Run, connector: Connect, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    meter = RequestMeter(lambda: None)
    proxy = HttpProxy(connector)
    server = run(stack(AddExtensionLayer(meter), proxy))
    for _ in range(3):
        await server.exchange(b"GET http://%b/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % origin.host)
    await server.exchange(b"CONNECT %b HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n\r\n" % origin.host, eof=True)
    await server.idle()
    proxy.drain()
    assert counted(meter) == {"forward": {2: 3}, "connect": {2: 1}}


def test_whatever_an_application_calls_its_routes_their_number_is_bounded() -> None:
    meter = RequestMeter(lambda: None)
    for number in range(3000):
        meter.tell(f"route {number}", 200, 0.001, 2.0)
    routes = meter.take()
    assert len(routes) == 1001
    assert routes["other"].statuses[2] == 2000
    assert routes["route 0"].slow == [1, 1, 0]
    assert meter.take() == {}


async def test_metrics_have_a_series_for_each_route(run: Run, connector: Connect, run_origin: RunOrigin) -> None:
    labels = {"listener": "default", "route": "forward"}

    def value(name: str, **more: str) -> float:
        return REGISTRY.get_sample_value(f"rama_http_{name}_total", labels | more) or 0.0

    before = value("requests", status="2xx")
    seconds = value("request_seconds")
    origin = run_origin(OK)
    proxy = HttpProxy(connector)
    server = run(stack(MetricsLayer(), proxy))
    await asyncio.gather(*(server.exchange(b"GET http://%b/ HTTP/1.0\r\n\r\n" % origin.host) for _ in range(3)))
    await eventually(lambda: value("requests", status="2xx") == before + 3)
    assert value("request_seconds") > seconds
    proxy.drain()

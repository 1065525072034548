"""The reverse proxy: routes, pools, health and retries, by what reaches which backend."""

from __future__ import annotations

import asyncio

import pytest

from rama_ebpf.core import Authority, Service
from rama_ebpf.services.http import (
    BackendPool,
    HealthCheck,
    HttpServer,
    HttpTimeouts,
    PassiveHealth,
    Request,
    Response,
    Route,
    Routes,
)
from rama_ebpf.services.http.proxy.health import BackendHealth
from rama_ebpf.services.proxy_protocol import ProxyHeader, ProxyProtocolConnector, ProxyProtocolLayer

from .conftest import DATE, OK, OK_VIA, Connect, MakePool, Origin, Run, RunOrigin, eventually, nobody


def at(port: int) -> Authority:
    return Authority.of("127.0.0.1", port)


def get(path: str = "/", host: str = "a.test", method: str = "GET", *fields: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *fields, "", ""]).encode()


def named(name: str) -> Service[Request, Response]:
    async def app(request: Request) -> Response:
        return Response.text(200, name)

    return app


async def test_request_reaches_the_backend_with_the_clients_host_and_via(
    run: Run, pool_of: MakePool, run_origin: RunOrigin
) -> None:
    origin = run_origin(OK)
    server = run(HttpServer(pool_of(origin.port)))
    answer = await server.exchange(get("/x?y"))
    assert origin.requests == [b"GET /x?y HTTP/1.1\r\nHost: a.test\r\nVia: 1.1 rama-ebpf\r\n\r\n"]
    assert answer == OK_VIA.replace(b"Content-Length: 2\r\n", b"Content-Length: 2\r\nConnection: close\r\n")


async def test_own_host_names_the_backend(run: Run, pool_of: MakePool, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    server = run(HttpServer(pool_of(origin.port, own_host=True)))
    await server.exchange(get())
    assert b"\r\nHost: " + origin.host + b"\r\n" in origin.requests[0]


async def test_backend_connections_are_kept_across_clients(run: Run, pool_of: MakePool, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    pool = pool_of(origin.port)
    server = run(HttpServer(pool))
    for _ in range(4):
        assert (await server.exchange(get())).endswith(b"ok")
    assert origin.connections == 1
    await pool.stop()
    await eventually(lambda: pool.connections.idle == 0)


@pytest.mark.parametrize(
    ("request_bytes", "answer"),
    [
        (get("/", "a.test"), b"a"),
        (get("/", "A.TEST:8080"), b"a"),
        (get("/", "a.test."), b"a"),
        (get("/api", "a.test"), b"api"),
        (get("/api/", "a.test"), b"api"),
        (get("/api/v1?x", "a.test"), b"api"),
        (get("/apix", "a.test"), b"a"),
        (get("/%61p%69/v1", "a.test"), b"api"),
        (get("/api%20", "a.test"), b"a"),
        (get("/api/v1", "a.test", "POST", "Content-Length: 0"), b"post"),
        (get("/apix", "a.test", "POST", "Content-Length: 0"), b"a"),
        (get("/", "x.b.test"), b"wild"),
        (get("/", "x.y.b.test"), b"wild"),
        (get("/", "one.b.test"), b"one"),
    ],
)
async def test_the_most_specific_route_takes_the_request(run: Run, request_bytes: bytes, answer: bytes) -> None:
    routes = Routes(
        [
            Route(named("a"), host="a.test"),
            Route(named("api"), host="a.test", path="/api/", methods={"GET"}),
            Route(named("post"), host="a.test", path="/api", methods={"POST"}),
            Route(named("wild"), host="*.b.test"),
            Route(named("one"), host="one.b.test"),
        ]
    )
    server = run(HttpServer(routes))
    assert (await server.exchange(request_bytes)).rpartition(b"\r\n\r\n")[2] == answer


async def test_path_is_forwarded_as_it_was_spelt(run: Run, pool_of: MakePool, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    server = run(HttpServer(Routes([Route(pool_of(origin.port), path="/api")])))
    await server.exchange(get("/%61p%69?%62", "a.test"))
    assert origin.requests[0].startswith(b"GET /%61p%69?%62 HTTP/1.1\r\n")


async def test_no_route_is_told_apart_by_host_path_and_method(run: Run) -> None:
    server = run(HttpServer(Routes([Route(named("x"), host="a.test", path="/x", methods={"GET", "HEAD"})])))
    assert (await server.exchange(get("/x", "b.test"))).startswith(b"HTTP/1.1 421 Misdirected Request\r\n")
    assert (await server.exchange(get("/y", "a.test"))).startswith(b"HTTP/1.1 404 Not Found\r\n")
    answer = await server.exchange(get("/x", "a.test", "DELETE"))
    assert answer.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n")
    assert b"\r\nAllow: GET, HEAD\r\n" in answer
    assert (await server.exchange(b"GET /x HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize(
    "path",
    [
        "/x/../admin",
        "/x/%2e%2e/admin",
        "/x/.%2E/admin",
        "/./admin",
        "//admin",
        "/x//admin",
        "/x%2fadmin",
        "/x%5c..",
        "/..",
        "/a;b",
    ],
)
async def test_path_that_the_backend_may_read_differently_is_refused(run: Run, path: str) -> None:
    routes = [Route(named("open"), path="/"), Route(named("secret"), path="/admin", methods={"NONE"})]
    assert (await run(HttpServer(Routes(routes))).exchange(get(path))).startswith(b"HTTP/1.1 400 ")
    lenient = run(HttpServer(Routes(routes, ambiguous_paths=True)))
    assert (await lenient.exchange(get(path))).startswith(b"HTTP/1.1 200 ")


async def test_requests_go_where_the_fewest_are_under_way(run: Run, pool_of: MakePool) -> None:
    release = asyncio.Event()
    counts = [0, 0, 0]

    def backend(index: int) -> Service[Request, Response]:
        async def app(request: Request) -> Response:
            counts[index] += 1
            await release.wait()
            return Response.text(200, "ok")

        return app

    servers = [run(HttpServer(backend(index))) for index in range(3)]
    proxy = run(HttpServer(pool_of(*(server.port for server in servers))))
    requests = [asyncio.create_task(proxy.exchange(get())) for _ in range(9)]
    await eventually(lambda: sum(counts) == 9)
    assert counts == [3, 3, 3]
    release.set()
    await asyncio.gather(*requests)


async def test_a_backend_that_is_full_gets_no_more_and_503_when_all_are(run: Run, pool_of: MakePool) -> None:
    release = asyncio.Event()
    arrived = 0

    async def app(request: Request) -> Response:
        nonlocal arrived
        arrived += 1
        await release.wait()
        return Response.text(200, "ok")

    pool = pool_of(run(HttpServer(app)).port, max_busy=1)
    proxy = run(HttpServer(pool))
    first = asyncio.create_task(proxy.exchange(get()))
    await eventually(lambda: arrived == 1)
    answer = await proxy.exchange(get())
    assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"Retry-After: 1\r\n" in answer
    assert b"error=connection_limit_reached\r\n" in answer
    release.set()
    assert (await first).endswith(b"ok")
    assert (await proxy.exchange(get())).endswith(b"ok")


async def test_dead_backend_costs_no_request(run: Run, pool_of: MakePool, run_origin: RunOrigin) -> None:
    origin = run_origin(OK, until=[b"hello"])
    proxy = run(HttpServer(pool_of(await nobody(), origin.port)))
    for _ in range(5):
        # Not idempotent, with a body: no connection was made, so nothing was sent and it may move on.
        answer = await proxy.exchange(get("/", "a.test", "POST", "Content-Length: 5") + b"hello")
        assert answer.endswith(b"ok")


async def test_get_is_repeated_on_another_backend_and_post_is_not(
    run: Run, pool_of: MakePool, run_origin: RunOrigin
) -> None:
    def pool(rude: Origin, good: Origin) -> BackendPool:
        passive = PassiveHealth(failures=100)
        return pool_of(rude.port, good.port, passive=passive)

    rude, good = run_origin(b"", close=True), run_origin(OK)
    proxy = run(HttpServer(pool(rude, good)))
    for _ in range(40):  # whichever backend it begins with
        assert (await proxy.exchange(get())).endswith(b"ok")
    assert len(good.requests) == 40
    assert rude.requests
    rude, good = run_origin(b"", close=True), run_origin(OK)
    proxy = run(HttpServer(pool(rude, good)))
    answers = [await proxy.exchange(get("/", "a.test", "POST", "Content-Length: 0")) for _ in range(20)]
    failed = [answer for answer in answers if answer.startswith(b"HTTP/1.1 502 ")]
    assert len(failed) == len(rude.requests) > 0
    assert len(good.requests) == 20 - len(failed)


async def test_retry_statuses_are_tried_elsewhere_and_the_last_one_is_told(
    run: Run, pool_of: MakePool, run_origin: RunOrigin
) -> None:
    busy = b"HTTP/1.1 503 Busy\r\n" + DATE + b"Content-Length: 0\r\n\r\n"
    first, second = run_origin(busy), run_origin(busy)
    proxy = run(HttpServer(pool_of(first.port, second.port, retry_statuses={503})))
    assert (await proxy.exchange(get())).startswith(b"HTTP/1.1 503 Busy\r\n")
    assert len(first.requests) == len(second.requests) == 1


async def test_failing_backend_is_ejected_and_comes_back(run: Run, pool_of: MakePool, run_origin: RunOrigin) -> None:
    now = 0.0
    rude, good = run_origin(b"", close=True), run_origin(OK)
    pool = pool_of(rude.port, good.port, passive=PassiveHealth(failures=2, eject=10), clock=lambda: now)
    proxy = run(HttpServer(pool))
    for _ in range(30):
        assert (await proxy.exchange(get())).endswith(b"ok")
    assert len(rude.requests) == 2
    now = 11.0
    for _ in range(30):
        assert (await proxy.exchange(get())).endswith(b"ok")
    assert len(rude.requests) == 3  # on probation one failure is enough


async def test_backends_that_only_failed_requests_are_tried_when_there_is_no_other(
    run: Run, pool_of: MakePool, run_origin: RunOrigin
) -> None:
    origin = run_origin(b"", b"", OK, close=True)
    proxy = run(HttpServer(pool_of(origin.port, passive=PassiveHealth(failures=1))))
    assert [(await proxy.exchange(get()))[9:12] for _ in range(3)] == [b"502", b"502", b"200"]


async def test_active_checks_take_a_backend_out_and_bring_it_back(run: Run, pool_of: MakePool) -> None:
    healthy = True

    async def app(request: Request) -> Response:
        if request.path == "/health":
            return Response.text(200 if healthy else 500, "")
        return Response.text(200, "ok")

    backend = run(HttpServer(app))
    check = HealthCheck("/health", interval=0.02, rise=2, fall=2)
    pool = pool_of(backend.port, check=check)
    proxy = run(HttpServer(pool))
    pool.start()
    assert (await proxy.exchange(get())).endswith(b"ok")
    healthy = False
    await eventually(lambda: not pool.passing)
    answer = await proxy.exchange(get())
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"error=destination_unavailable\r\n" in answer
    healthy = True
    await eventually(lambda: len(pool.passing) == 1)
    assert (await proxy.exchange(get())).endswith(b"ok")
    await pool.stop()


def test_health_counts_streaks_and_not_sums() -> None:
    health = BackendHealth(HealthCheck(rise=2, fall=3), PassiveHealth(), lambda: 0.0)
    for success in (False, False, True, False, False, True):
        health.probed(success)
        assert health.passing
    for _ in range(3):
        health.probed(False)
    assert not health.passing
    for success in (True, False, True):
        health.probed(success)
        assert not health.passing
    health.probed(True)
    assert health.passing


def test_a_success_clears_the_failures_before_it() -> None:
    health = BackendHealth(None, PassiveHealth(failures=2), lambda: 0.0)
    for _ in range(5):
        health.failed()
        health.succeeded()
    assert not health.ejected
    health.failed()
    health.failed()
    assert health.ejected


async def test_backend_is_told_the_client_by_proxy_protocol_on_a_connection_of_its_own(
    run: Run, connector: Connect, pool_of: MakePool
) -> None:
    seen: list[ProxyHeader] = []

    async def app(request: Request) -> Response:
        seen.append(request.extensions.require(ProxyHeader))
        return Response.text(200, "ok")

    backend = run(ProxyProtocolLayer(["127.0.0.1/32"])(HttpServer(app)))
    pool = pool_of(backend.port, proxy_protocol=ProxyProtocolConnector(connector))
    proxy = run(HttpServer(pool))
    ports = []
    for _ in range(2):
        reader, writer = await proxy.open()
        ports.append(writer.get_extra_info("sockname")[1])
        writer.write(get())
        assert (await reader.read()).endswith(b"ok")
        writer.close()
    assert [header.source.port for header in seen if header.source is not None] == ports
    assert [header.destination.port for header in seen if header.destination is not None] == [proxy.port] * 2
    assert pool.connections.idle == 0


async def test_connect_to_a_reverse_proxy_is_refused(run: Run, pool_of: MakePool, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    proxy = run(HttpServer(pool_of(origin.port)))
    answer = await proxy.exchange(b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert origin.connections == 0


async def test_slow_backend_gets_504_and_no_second_chance_for_post(
    run: Run, pool_of: MakePool, run_origin: RunOrigin
) -> None:
    silent = run_origin(b"")
    pool = pool_of(silent.port, timeouts=HttpTimeouts(response=0.1))
    proxy = run(HttpServer(pool))
    assert (await proxy.exchange(get())).startswith(b"HTTP/1.1 504 ")

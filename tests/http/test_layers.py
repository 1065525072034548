"""HTTP layers, by what crosses the wire."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h2.events
import pytest

from rama_ebpf.core import AuthFailed, Authority, Credentials, IPAddress, User, stack
from rama_ebpf.layers import by_source
from rama_ebpf.layers.rate import RateLimitLayer
from rama_ebpf.layers.strikes import StrikeLayer, StrikeLimit
from rama_ebpf.services.http import (
    BackendPool,
    Body,
    ForwardProxy,
    Headers,
    HttpError,
    HttpProxy,
    HttpServer,
    Request,
    Response,
)
from rama_ebpf.services.http.layers import (
    BasicAuthLayer,
    CorsLayer,
    HarLayer,
    HarRecorder,
    HookLayer,
    ProxyAuthLayer,
    RedirectLayer,
    RequestHeadersLayer,
    RequestId,
    RequestIdLayer,
    ResponseHeadersLayer,
    RewriteLayer,
    by_header,
    to_https,
)

from .conftest import OK, Connect, Run, RunOrigin
from .h2_client import h2_client


async def only_tom(credentials: Credentials) -> User:
    if credentials != Credentials("tom", "päss:word"):
        raise AuthFailed(f"wrong user name or password for {credentials.username!r}")
    return User("tom")


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def get(path: str = "/", *fields: str, method: str = "GET", close: bool = True) -> bytes:
    connection = ["Connection: close"] if close else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a.test", *connection, *fields, "", ""]).encode()


async def show(request: Request) -> Response:
    """Answer with the request's path and fields."""
    lines = [request.path, *(f"{name}: {value}" for name, value in request.headers)]
    return Response(200, Headers([("X-Inner", "1"), ("X-Other", "2")]), Body.of("\n".join(lines).encode()))


def content(answer: bytes) -> str:
    return answer.partition(b"\r\n\r\n")[2].decode()


def head(answer: bytes) -> list[str]:
    return answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")


# -- authentication --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["absolute", "CONNECT"])
async def test_407_keeps_the_connection_and_the_next_try_on_it_succeeds(
    run: Run, connector: Connect, run_origin: RunOrigin, method: str
) -> None:
    origin = run_origin(OK)
    proxy = run(HttpProxy(connector, layers=[ProxyAuthLayer(only_tom, realm="test")]))
    line = f"CONNECT {origin.authority}" if method == "CONNECT" else f"GET http://{origin.authority}/"
    reader, writer = await proxy.open()
    for field in ("", f"Proxy-Authorization: {basic('tom', 'wrong')}\r\n"):
        writer.write(f"{line} HTTP/1.1\r\nHost: {origin.authority}\r\n{field}\r\n".encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        assert head(answer)[0] == "HTTP/1.1 407 Proxy Authentication Required"
        assert 'Proxy-Authenticate: Basic realm="test", charset="UTF-8"' in head(answer)
        assert not any(line.startswith("Connection") for line in head(answer))
        assert await reader.readexactly(24) == b"authentication required\n"
    field = f"Proxy-Authorization: {basic('tom', 'päss:word')}\r\n"
    writer.write(f"{line} HTTP/1.1\r\nHost: {origin.authority}\r\n{field}\r\n".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
    if method == "CONNECT":
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.readexactly(len(OK)) == OK
    assert proxy.tcp.accepted == 1
    assert all(b"roxy-Auth" not in request for request in origin.requests)
    assert len(origin.requests) == 1
    writer.close()


async def test_407_to_a_request_with_a_body_keeps_the_connection_too(
    run: Run, connector: Connect, run_origin: RunOrigin
) -> None:
    origin = run_origin(OK)
    proxy = run(HttpProxy(connector, layers=[ProxyAuthLayer(only_tom)]))
    post = f"POST http://{origin.authority}/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
    field = f"Proxy-Authorization: {basic('tom', 'päss:word')}\r\nConnection: close\r\n"
    again = f"GET http://{origin.authority}/ HTTP/1.1\r\nHost: a\r\n{field}\r\n"
    answer = await proxy.exchange(post.encode(), again.encode())
    assert answer.startswith(b"HTTP/1.1 407 ")
    assert b"HTTP/1.1 200 OK\r\n" in answer


@pytest.mark.parametrize("method", ["GET", "CONNECT"])
async def test_407_over_http_2_keeps_the_connection_too(
    run: Run, connector: Connect, run_origin: RunOrigin, method: str
) -> None:
    origin = run_origin(OK)
    forward = ForwardProxy(connector)
    server = run(HttpServer(stack(ProxyAuthLayer(only_tom), forward), h2c=True))
    fields = [(":method", method), (":authority", origin.authority)]
    fields += [] if method == "CONNECT" else [(":scheme", "http"), (":path", "/")]
    async with h2_client(server.port) as client:
        refused, body = await client.response(client.request(fields))
        assert (refused[":status"], body) == ("407", b"authentication required\n")
        assert refused["proxy-authenticate"] == 'Basic realm="proxy", charset="UTF-8"'
        credentials = ("proxy-authorization", basic("tom", "päss:word"))
        stream_id = client.request([*fields, credentials], end=method == "GET")
        head = await client.until(h2.events.ResponseReceived, stream_id)
        assert dict(head.headers)[":status"] == "200"
        if method == "CONNECT":
            client.h2.send_data(stream_id, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        data = await client.until(h2.events.DataReceived, stream_id)
        assert data.data == (OK if method == "CONNECT" else b"ok")
    assert server.tcp.accepted == 1
    assert [b"roxy-" in request for request in origin.requests] == [False]
    forward.pool.close()
    await forward.pool.wait_closed()


@pytest.mark.parametrize(
    "value",
    [
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(b"no colon").decode(),
        "Basic " + base64.b64encode(b"\xff:\xff").decode(),
        "Bearer token",
        "Basic" + base64.b64encode(b"tom:x").decode(),
        f"{basic('tom', 'päss:word')}\r\nProxy-Authorization: {basic('tom', 'päss:word')}",
    ],
)
async def test_malformed_credentials_get_407(run: Run, connector: Connect, value: str) -> None:
    proxy = run(HttpProxy(connector, layers=[ProxyAuthLayer(only_tom)]))
    request = (
        f"GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\nProxy-Authorization: {value}\r\n\r\n"
    )
    assert (await proxy.exchange(request.encode())).startswith(b"HTTP/1.1 407 ")


async def test_wrong_credentials_are_strikes_and_none_are_not(run: Run, connector: Connect) -> None:
    struck: list[str] = []

    class Keeper:
        async def strike(
            self, ip: IPAddress, limit: StrikeLimit, /, *, reason: str, spared: IPAddress | None = None
        ) -> None:
            struck.append(reason)

    proxy = run(stack(StrikeLayer(Keeper()), HttpProxy(connector, layers=[ProxyAuthLayer(only_tom)])))
    request = b"GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    await proxy.exchange(request + b"\r\n")
    assert struck == []
    await proxy.exchange(request + b"Proxy-Authorization: Basic eDp5\r\n\r\n")
    assert struck == ["auth_failed"]
    await proxy.exchange(b"GET / HTTP/9.9\r\n\r\n")
    await proxy.idle()
    assert struck == ["auth_failed", "http_malformed"]


async def test_401_is_for_origins_and_the_field_goes_no_further(run: Run) -> None:
    seen: list[User | None] = []

    async def app(request: Request) -> Response:
        seen.append(request.extensions.get(User))
        return await show(request)

    server = run(HttpServer(stack(BasicAuthLayer(only_tom), app)))
    answer = await server.exchange(get())
    assert head(answer)[0] == "HTTP/1.1 401 Unauthorized"
    assert 'WWW-Authenticate: Basic realm="restricted", charset="UTF-8"' in head(answer)
    answer = await server.exchange(get("/x", f"Authorization: {basic('tom', 'päss:word')}", "X: 1"))
    assert content(answer) == "/x\nX: 1"
    assert seen == [User("tom")]


def test_realm_that_would_break_out_of_its_quotes_is_refused() -> None:
    with pytest.raises(ValueError, match="realm"):
        ProxyAuthLayer(only_tom, realm='a", x="b')


# -- headers ---------------------------------------------------------------------------------------------------


async def test_request_and_response_fields_are_changed(run: Run) -> None:
    layers = (
        RequestHeadersLayer(set={"X-A": "new"}, add={"X-B": "2"}, remove=["X-C"]),
        ResponseHeadersLayer(set={"X-Inner": "changed"}, add={"X-More": "1"}, remove=["X-Other"]),
    )
    server = run(HttpServer(stack(*layers, show)))
    answer = await server.exchange(get("/", "X-A: old", "X-B: 1", "X-C: 1", "X-A: older"))
    assert content(answer) == "/\nX-A: new\nX-B: 1\nX-B: 2"
    assert [line for line in head(answer) if line.startswith("X-")] == ["X-Inner: changed", "X-More: 1"]


@pytest.mark.parametrize(("name", "value"), [("X", "a\r\nY: b"), ("X\r\nY", "b"), ("X", "\0"), ("X Y", "b")])
def test_field_that_would_split_a_message_is_refused_when_composed(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=r"control character|not a header name"):
        ResponseHeadersLayer(set={name: value})


async def test_service_cannot_split_a_response(run: Run) -> None:
    async def app(request: Request) -> Response:
        return Response(200, Headers([("X", request.path[1:].replace("%0d", "\r").replace("%0a", "\n"))]))

    server = run(HttpServer(app))
    answer = await server.exchange(get("/a%0d%0aSet-Cookie:x"))
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"Set-Cookie" not in answer


# -- request id ------------------------------------------------------------------------------------------------


async def test_request_id_is_the_same_everywhere(run: Run) -> None:
    seen: list[str] = []

    async def app(request: Request) -> Response:
        seen.append(request.extensions.require(RequestId).text)
        return await show(request)

    server = run(HttpServer(stack(RequestIdLayer(), app)))
    answer = await server.exchange(get("/", "X-Request-Id: forged"))
    (identifier,) = seen
    assert len(identifier) == 32
    assert content(answer) == f"/\nX-Request-Id: {identifier}"
    assert f"X-Request-Id: {identifier}" in head(answer)


@pytest.mark.parametrize(("sent", "kept"), [("abc-1", True), ("a b", False), ("x" * 129, False), ("", False)])
async def test_trusted_request_id_is_kept_if_it_is_plain(run: Run, sent: str, kept: bool) -> None:
    server = run(HttpServer(stack(RequestIdLayer(trust=True, new=lambda: "ours"), show)))
    answer = await server.exchange(get("/", f"X-Request-Id: {sent}"))
    assert content(answer) == f"/\nX-Request-Id: {sent if kept else 'ours'}"


# -- rate ------------------------------------------------------------------------------------------------------


async def test_rate_by_header_refuses_with_429_and_retry_after(run: Run) -> None:
    now = 0.0
    layer = RateLimitLayer(0.1, burst=2, key=by_header("X-Key"), clock=lambda: now)
    server = run(HttpServer(stack(layer, show)))

    async def status(key: str) -> str:
        return head(await server.exchange(get("/", f"X-Key: {key}")))[0].split()[1]

    assert [await status("a") for _ in range(3)] == ["200", "200", "429"]
    assert await status("b") == "200"
    answer = await server.exchange(get("/", "X-Key: a"))
    assert "Retry-After: 10" in head(answer)
    now = 10.0
    assert await status("a") == "200"


async def test_rate_by_client_refuses_one_address_and_not_another(run: Run) -> None:
    server = run(HttpServer(stack(RateLimitLayer(0.1, burst=1, key=by_source(), clock=lambda: 0.0), show)))

    async def status(source: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, local_addr=(source, 0))
        writer.write(get())
        answer = await reader.read()
        writer.close()
        return answer.split()[1]

    assert [await status("127.0.0.1"), await status("127.0.0.1"), await status("127.0.0.2")] == [b"200", b"429", b"200"]


# -- CORS ------------------------------------------------------------------------------------------------------


def cors_fields(answer: bytes) -> dict[str, str]:
    pairs = (line.partition(": ") for line in head(answer)[1:])
    return {name: value for name, _, value in pairs if name.startswith("Access-Control") or name == "Vary"}


async def test_cors_preflight_and_response_of_an_allowed_origin(run: Run) -> None:
    layer = CorsLayer(
        ["https://app.test"], methods=["GET", "PUT"], headers=["X-A"], expose=["X-Inner"], credentials=True, max_age=60
    )
    server = run(HttpServer(stack(layer, show)))
    preflight = get("/", "Origin: https://app.test", "Access-Control-Request-Method: PUT", method="OPTIONS")
    answer = await server.exchange(preflight)
    assert head(answer)[0] == "HTTP/1.1 204 No Content"
    assert cors_fields(answer) == {
        "Access-Control-Allow-Origin": "https://app.test",
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Allow-Methods": "GET, PUT",
        "Access-Control-Allow-Headers": "X-A",
        "Access-Control-Max-Age": "60",
        "Vary": "Origin",
    }
    answer = await server.exchange(get("/", "Origin: https://app.test"))
    assert cors_fields(answer) == {
        "Access-Control-Allow-Origin": "https://app.test",
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Expose-Headers": "X-Inner",
        "Vary": "Origin",
    }


@pytest.mark.parametrize("origin", ["https://evil.test", "https://app.test.evil.test", "null", "http://app.test"])
async def test_cors_tells_other_origins_nothing(run: Run, origin: str) -> None:
    async def app(request: Request) -> Response:
        return Response(200, Headers([("Access-Control-Allow-Origin", "*")]))

    server = run(HttpServer(stack(CorsLayer(["https://app.test"]), app)))
    assert cors_fields(await server.exchange(get("/", f"Origin: {origin}"))) == {"Vary": "Origin"}
    preflight = get("/", f"Origin: {origin}", "Access-Control-Request-Method: PUT", method="OPTIONS")
    assert cors_fields(await server.exchange(preflight)) == {}


async def test_cors_for_any_origin_needs_no_vary_and_takes_no_credentials(run: Run) -> None:
    server = run(HttpServer(stack(CorsLayer("*"), show)))
    answer = await server.exchange(get("/", "Origin: https://any.test"))
    assert cors_fields(answer) == {"Access-Control-Allow-Origin": "*"}
    with pytest.raises(ValueError, match="credentials"):
        CorsLayer("*", credentials=True)


# -- redirect and rewrite --------------------------------------------------------------------------------------


async def test_redirect_to_https_keeps_path_and_query(run: Run) -> None:
    server = run(HttpServer(stack(RedirectLayer(to_https), show)))
    answer = await server.exchange(get("/a?b=c"))
    assert head(answer)[:2] == ["HTTP/1.1 308 Permanent Redirect", "Location: https://a.test/a?b=c"]
    secure = run(HttpServer(stack(RedirectLayer(to_https), show), scheme="https"))
    assert head(await secure.exchange(get("/a")))[0] == "HTTP/1.1 200 OK"


async def test_rewrite_replaces_the_beginning_of_the_path(run: Run) -> None:
    server = run(HttpServer(stack(RewriteLayer([("/old/([a-z]+)", r"/new/\1"), ("/old", "/other")]), show)))
    assert content(await server.exchange(get("/old/x/y?z"))) == "/new/x/y?z"
    assert content(await server.exchange(get("/old/7"))) == "/other/7"
    assert content(await server.exchange(get("/x/old"))) == "/x/old"


async def test_rewrite_that_makes_no_path_is_500(run: Run) -> None:
    server = run(HttpServer(stack(RewriteLayer([("/x", "http://evil.test/")]), show)))
    assert head(await server.exchange(get("/x")))[0].startswith("HTTP/1.1 500 ")


# -- hooks -----------------------------------------------------------------------------------------------------


async def test_hooks_change_messages_and_answer_for_the_service(run: Run) -> None:
    async def on_request(request: Request) -> Response | None:
        if request.path == "/blocked":
            return Response.text(403, "blocked")
        request.headers.add("X-Hook", "1")
        return None

    async def on_response(request: Request, response: Response) -> None:
        response.headers.add("X-Hook", request.path)

    server = run(HttpServer(stack(HookLayer(on_request=on_request, on_response=on_response), show)))
    answer = await server.exchange(get("/x"))
    assert content(answer) == "/x\nX-Hook: 1"
    assert "X-Hook: /x" in head(answer)
    answer = await server.exchange(get("/blocked"))
    assert (head(answer)[0], content(answer)) == ("HTTP/1.1 403 Forbidden", "blocked")
    assert "X-Hook: /blocked" in head(answer)


async def test_hooks_change_bodies_as_they_stream(run: Run, connector: Connect, run_origin: RunOrigin) -> None:
    origin = run_origin(OK, until=b"0\r\n\r\n")
    pool = BackendPool([Authority.of("127.0.0.1", origin.port)], connector)
    layer = HookLayer(
        request_body=lambda request: bytes.upper if request.method == "POST" else None,
        response_body=lambda request, response: lambda chunk: chunk.replace(b"o", b"oo") if chunk else b"!",
    )
    server = run(HttpServer(stack(layer, pool)))
    answer = await server.exchange(get("/", "Content-Length: 5", method="POST") + b"hello")
    assert origin.requests[0].endswith(b"Transfer-Encoding: chunked\r\n\r\n5\r\nHELLO\r\n0\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n3\r\nook\r\n1\r\n!\r\n0\r\n\r\n")
    await pool.stop()


async def test_hook_that_fails_is_500_and_gives_the_upstream_up(run: Run) -> None:
    closed = asyncio.Event()

    async def app(request: Request) -> Response:
        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b"x"

        async def close() -> None:
            closed.set()

        return Response(200, Headers(), Body.stream(endless(), close=close))

    async def on_response(request: Request, response: Response) -> None:
        raise HttpError(500, "the hook failed")

    server = run(HttpServer(stack(HookLayer(on_response=on_response), app)))
    assert head(await server.exchange(get()))[0].startswith("HTTP/1.1 500 ")
    assert closed.is_set()


# -- HAR -------------------------------------------------------------------------------------------------------


def entries(recorder: HarRecorder) -> list[dict[str, Any]]:
    log: Any = recorder.archive()["log"]
    return list(log["entries"])


async def test_har_records_an_exchange_without_secrets(run: Run, tmp_path: Path) -> None:
    async def app(request: Request) -> Response:
        body = await request.body.read(100)
        return Response(201, Headers([("Content-Type", "text/plain"), ("Set-Cookie", "s=1")]), Body.of(body.upper()))

    recorder = HarRecorder()
    at = datetime(2026, 1, 1, tzinfo=UTC)
    server = run(HttpServer(stack(HarLayer(recorder, clock=lambda: 5.0, now=lambda: at), app)))
    await server.exchange(get("/x?a=1&b", "Cookie: s=1", "Content-Length: 5", method="POST") + b"hello")
    path = tmp_path / "log.har"
    recorder.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    archive = json.loads(path.read_text())
    assert archive["log"]["version"] == "1.2"
    (entry,) = archive["log"]["entries"]
    assert entry["startedDateTime"] == "2026-01-01T00:00:00+00:00"
    request, response = entry["request"], entry["response"]
    assert (request["method"], request["url"], request["httpVersion"]) == ("POST", "http://a.test/x?a=1&b", "HTTP/1.1")
    assert request["queryString"] == [{"name": "a", "value": "1"}, {"name": "b", "value": ""}]
    assert {"name": "Cookie", "value": "(redacted)"} in request["headers"]
    assert (request["bodySize"], request["postData"]["text"]) == (5, "hello")
    assert (response["status"], response["content"]["text"], response["bodySize"]) == (201, "HELLO", 5)
    assert {"name": "Set-Cookie", "value": "(redacted)"} in response["headers"]
    assert "comment" not in response


async def test_har_bounds_what_it_keeps_and_marks_what_broke_off(run: Run) -> None:
    async def app(request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"\xff" * 600
            yield b"\xff" * 600
            if request.path == "/broken":
                raise ConnectionResetError("gone")

        return Response(200, Headers(), Body.stream(chunks()))

    recorder = HarRecorder(max_entries=2, max_body=1000)
    server = run(HttpServer(stack(HarLayer(recorder), app)))
    for path in ("/forgotten", "/whole"):
        assert (await server.exchange(get(path))).endswith(b"0\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        await server.exchange(get("/broken"))
    whole, broken = entries(recorder)
    assert whole["response"]["content"] == {
        "size": 1200,
        "mimeType": "",
        "text": base64.b64encode(b"\xff" * 1000).decode(),
        "encoding": "base64",
        "comment": "the first 1000 bytes",
    }
    assert "comment" not in whole["response"]
    assert broken["response"]["comment"] == "the body broke off"

"""``engine = "h11"``: what h11 reads in another way, or not at all, is refused."""

from __future__ import annotations

import pytest

from rama_ebpf.services.http import HttpLimits, HttpProxy, HttpServer, Request, Response
from rama_ebpf.services.http.h1 import reader as strict_module
from rama_ebpf.services.http.h1.reader import NEED_DATA, PAUSED, Closed, Content, End, Role, reader
from rama_ebpf.services.http.h1.second_reader import SecondReader
from rama_ebpf.services.http.message.errors import MalformedMessage

from .conftest import Run

LIMITS = HttpLimits(engine="h11")

REQUESTS = {
    "GET": b"GET / HTTP/1.1\r\nHost: a.test\r\nX-A:  b \r\n\r\n",
    "empty line in front": b"\r\nGET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "length": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 005\r\n\r\nhello",
    "chunks": b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nX-T: 1\r\n\r\n",
    "HTTP/1.0": b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
}
RESPONSES = {
    "length": ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"),
    "chunks": ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    "until the end": ("GET", b"HTTP/1.1 200 OK\r\n\r\nhello"),
    "HEAD": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
    "not modified": ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
    "interim": ("GET", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"),
    "tunnel": ("CONNECT", b"HTTP/1.1 200 OK\r\n\r\n"),
}


def read(role: Role, method: str, pieces: list[bytes]) -> tuple[list[object], bytes]:
    connection = reader(role, LIMITS)
    assert isinstance(connection, SecondReader)
    if method:
        connection.asked(method)
    heads: list[object] = []
    body = b""
    for piece in [*pieces, b""]:
        connection.receive(piece)
        while True:
            event = connection.next_event()
            if event is NEED_DATA or event is PAUSED or isinstance(event, Closed):
                break
            if isinstance(event, Content):
                body += event.data
            elif not isinstance(event, End):
                heads.append(event)
        assert connection.movable == 0
    return heads, body


@pytest.mark.parametrize("what", REQUESTS)
def test_requests_that_both_read_alike_are_taken_however_they_are_cut(what: str) -> None:
    data = REQUESTS[what]
    whole = read(Role.SERVER, "", [data])
    assert len(whole[0]) == 1
    assert whole[1] == (b"hello" if b"POST" in data else b"")
    assert all(read(Role.SERVER, "", [data[:cut], data[cut:]])[1] == whole[1] for cut in range(1, len(data)))


@pytest.mark.parametrize("what", RESPONSES)
def test_responses_that_both_read_alike_are_taken_however_they_are_cut(what: str) -> None:
    method, data = RESPONSES[what]
    whole = read(Role.CLIENT, method, [data])
    assert len(whole[0]) == 1 + (what == "interim")
    assert whole[1] == (b"hello" if data.endswith((b"hello", b"0\r\n\r\n")) else b"")
    assert all(read(Role.CLIENT, method, [data[:cut], data[cut:]])[1] == whole[1] for cut in range(1, len(data)))


def test_a_head_that_h11_reads_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = strict_module.parse_request
    monkeypatch.setattr(strict_module, "parse_request", lambda *args: parse(*args)._replace(method="PUT"))
    with pytest.raises(MalformedMessage, match="h11 reads another message"):
        read(Role.SERVER, "", [REQUESTS["GET"]])


def test_an_end_that_h11_sees_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = strict_module.parse_request
    monkeypatch.setattr(strict_module, "parse_request", lambda *args: parse(*args)._replace(length=4))
    with pytest.raises(MalformedMessage, match="h11 sees the end of the message elsewhere"):
        read(Role.SERVER, "", [REQUESTS["length"][:-1]])


async def test_proxy_and_server_with_it_serve_kept_connections(run: Run, connector) -> None:  # type: ignore[no-untyped-def]
    async def app(request: Request) -> Response:
        return Response.text(200, (await request.body.read(1 << 20)).decode() or "nothing")

    origin = run(HttpServer(app, limits=LIMITS))
    proxy = run(HttpProxy(connector, limits=LIMITS))
    reader_, writer = await proxy.open()
    for body in (b"", b"hello", b"a" * 100_000):
        writer.write(
            b"POST http://%b/ HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n"
            % (origin.authority.encode(), origin.authority.encode(), len(body))
        )
        writer.write(body)
        head = await reader_.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert await reader_.readexactly(length) == (body or b"nothing")
    writer.close()

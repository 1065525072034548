"""Content codings: layers read bodies as they are meant, and no body can be made to mean more than its bound."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Callable

import brotli
import pytest
from backports import zstd

from rama_ebpf.core import Authority, Service, Stream
from rama_ebpf.services.http import HttpProxy, Request, Response
from rama_ebpf.services.http.layers import DecodeLayer, HookLayer
from rama_ebpf.services.http.message.coding import BadCoding, Decoder, codings, decoder

from .conftest import Origin, Run

RunOrigin = Callable[..., Origin]
Connect = Service[Authority, Stream]

TEXT = b"".join(b"line %d of a page\n" % number for number in range(5000))
BOMB = bytes(64 * 1024 * 1024)


def raw_deflate(data: bytes) -> bytes:
    engine = zlib.compressobj(wbits=-15)
    return engine.compress(data) + engine.flush()


ENCODERS: dict[str, list[Callable[[bytes], bytes]]] = {
    "gzip": [gzip.compress, lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:])],
    "deflate": [zlib.compress, raw_deflate],
    "br": [lambda data: bytes(brotli.compress(data, quality=4))],
    "zstd": [zstd.compress, lambda data: zstd.compress(data[:1000]) + zstd.compress(data[1000:])],
}
CASES = [(coding, encode) for coding, encoders in ENCODERS.items() for encode in encoders]
NAMES = [f"{coding}{number}" for coding, encoders in ENCODERS.items() for number in range(len(encoders))]


def made(coding: str) -> Decoder:
    found = decoder(coding)
    assert found is not None
    return found


def decoded(coding: str, pieces: list[bytes], most: int = 1000) -> bytes:
    engine = made(coding)
    out = b""
    for piece in pieces:
        engine.feed(piece)
        while part := engine.take(most):
            assert len(part) <= most or coding == "br"
            out += part
    assert engine.complete
    return out


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_all_codings_are_known_where_the_tests_run() -> None:
    assert codings() == {"gzip", "x-gzip", "deflate", "br", "zstd"}
    assert decoder("compress") is None


@pytest.mark.parametrize(("coding", "encode"), CASES, ids=NAMES)
@pytest.mark.parametrize("size", [1, 7, 1_000_000])
def test_a_body_is_decoded_whatever_pieces_it_comes_in(
    coding: str, encode: Callable[[bytes], bytes], size: int
) -> None:
    data = TEXT[: 4000 if size == 1 else len(TEXT)]
    assert decoded(coding, cut(encode(data), size)) == data


@pytest.mark.parametrize(("coding", "encode"), CASES, ids=NAMES)
def test_a_body_that_ends_early_or_goes_on_is_none(coding: str, encode: Callable[[bytes], bytes]) -> None:
    whole = encode(TEXT)
    engine = made(coding)
    engine.feed(whole[:-3])
    while engine.take(100_000):
        pass
    assert not engine.complete
    with pytest.raises(BadCoding):
        decoded(coding, [whole, b"\x01\x02 rubbish behind it"])


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
def test_a_bomb_gives_no_more_at_a_time_than_was_asked_for(coding: str) -> None:
    engine = made(coding)
    engine.feed(ENCODERS[coding][0](BOMB))
    largest = 0
    for _ in range(20):
        part = engine.take(1000)
        assert part
        largest = max(largest, len(part))
    assert largest <= 64 * 1024  # br rounds up


def reply(coding: bytes, body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    lines = [b"HTTP/1.1 " + status, b"Content-Encoding: " + coding, b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join([*lines, b"Date: Thu, 01 Jan 2026 00:00:00 GMT", b"", body])


def proxy_that_sees(seen: list[bytes], connector: Connect, **options: int) -> HttpProxy:
    def look(_request: Request, _response: Response) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            seen.append(data)
            return data.replace(b"page", b"PAGE")

        return change

    return HttpProxy(connector, layers=[HookLayer(response_body=look), DecodeLayer(**options)])


def get(origin: Origin, *fields: bytes) -> bytes:
    return b"\r\n".join(
        [b"GET http://" + origin.host + b"/ HTTP/1.0", b"Host: a.test", *fields, b"Connection: close", b"", b""]
    )


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_layers_outside_read_and_change_what_the_upstream_meant(
    run: Run, connector: Connect, run_origin: RunOrigin, coding: str
) -> None:
    origin = run_origin(reply(coding.encode(), ENCODERS[coding][0](TEXT), b'ETag: "x"', b"Accept-Ranges: bytes"))
    seen: list[bytes] = []
    answer = await run(proxy_that_sees(seen, connector)).exchange(get(origin, b"Accept-Encoding: br, exotic, *;q=0.1"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"".join(seen) == TEXT
    assert body == TEXT.replace(b"page", b"PAGE")
    assert b"Content-Encoding" not in head
    assert b"Accept-Ranges" not in head
    assert b'ETag: W/"x"' in head
    assert b"Accept-Encoding: br\r\n" in origin.requests[0]


async def test_codings_upon_codings_are_taken_off(run: Run, connector: Connect, run_origin: RunOrigin) -> None:
    origin = run_origin(reply(b"gzip, br", ENCODERS["br"][0](gzip.compress(TEXT))))
    seen: list[bytes] = []
    await run(proxy_that_sees(seen, connector)).exchange(get(origin))
    assert b"".join(seen) == TEXT


@pytest.mark.parametrize(
    "answer",
    [
        reply(b"exotic", b"abc"),
        reply(b"gzip", gzip.compress(b"abc"), b"Cache-Control: public, no-transform"),
        reply(b"gzip", gzip.compress(b"abc")[3:9], b"Content-Range: bytes 3-8/23", status=b"206 Partial Content"),
    ],
    ids=["unknown", "no-transform", "range"],
)
async def test_what_must_not_be_decoded_passes_as_it_was_sent(
    run: Run, connector: Connect, run_origin: RunOrigin, answer: bytes
) -> None:
    seen: list[bytes] = []
    got = await run(proxy_that_sees(seen, connector)).exchange(get(run_origin(answer)))
    assert b"Content-Encoding: " in got
    assert got.endswith(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(BOMB)),
        ("zstd", zstd.compress(BOMB)),
        ("br", ENCODERS["br"][0](BOMB)),
        ("gzip", gzip.compress(TEXT)[:-5]),
        ("gzip", b"this is no gzip"),
    ],
    ids=["gzip bomb", "zstd bomb", "br bomb", "cut", "other"],
)
async def test_a_bomb_or_a_broken_body_never_looks_whole(
    run: Run, connector: Connect, run_origin: RunOrigin, coding: str, body: bytes
) -> None:
    server = run(proxy_that_sees([], connector, max_body=1024 * 1024))
    origin = run_origin(reply(coding.encode(), body))
    request = get(origin).replace(b"HTTP/1.0", b"HTTP/1.1")
    reader, writer = await server.open()
    writer.write(request)
    got = bytearray()
    ended = False
    with contextlib.suppress(ConnectionResetError):
        while data := await reader.read(65536):
            got += data
        ended = True
    assert not ended, "the response ended in order"
    assert len(got) < 2 * 1024 * 1024
    assert not got.endswith(b"0\r\n\r\n")
    writer.close()


async def test_a_request_that_is_a_bomb_is_413_and_one_that_is_broken_400(
    run: Run, connector: Connect, run_origin: RunOrigin
) -> None:
    origin = run_origin(reply(b"identity", b"ok"), until=b"\r\n0\r\n")
    server = run(HttpProxy(connector, layers=[DecodeLayer(max_body=10_000, requests=True)]))
    for body, status in ((gzip.compress(BOMB[:100_000]), b" 413 "), (b"no gzip", b" 400 ")):
        head = b"POST http://%b/ HTTP/1.1\r\nHost: a.test\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        answer = await server.exchange(head % (origin.host, len(body)) + body)
        assert answer.partition(b"\r\n")[0].startswith(b"HTTP/1.1" + status)
    fine = gzip.compress(b"hello")
    head = head.replace(b"Host", b"Connection: close\r\nHost")
    await server.exchange(head % (origin.host, len(fine)) + fine)
    assert b"5\r\nhello\r\n0\r\n" in origin.requests[-1]
    assert b"Content-Encoding" not in origin.requests[-1]


def test_a_bound_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="max_body"):
        DecodeLayer(max_body=0)

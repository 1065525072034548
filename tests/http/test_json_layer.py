"""JSON is rewritten as values; what is none goes on byte for byte."""

from __future__ import annotations

import gzip
import json

import pytest

from rama_ebpf.core import stack
from rama_ebpf.services.http import Body, Headers, HttpError, Request, Response
from rama_ebpf.services.http.layers import DecodeLayer, Json, JsonLayer


def doubled(_request: Request, value: Json) -> Json:
    return [value, value]


def request(body: bytes = b"", **fields: str) -> Request:
    headers = Headers([(name.replace("_", "-"), value) for name, value in fields.items()])
    return Request("POST", "a", "/", headers=headers, body=Body.of(body))


async def answered(data: bytes, kind: str, layer: JsonLayer, *more: tuple[str, str]) -> tuple[bytes, Headers]:
    async def app(_request: Request) -> Response:
        return Response(200, Headers([("Content-Type", kind), *more]), Body.of(data))

    response = await stack(layer, DecodeLayer(), app)(request())
    return await response.body.read(1 << 20), response.headers


@pytest.mark.parametrize("kind", ["application/json", "application/problem+json; charset=utf-8", "APPLICATION/JSON"])
async def test_json_is_what_its_content_type_says(kind: str) -> None:
    data, headers = await answered(b'{"a": "\xc3\xa4"}', kind, JsonLayer(response=doubled), ("ETag", '"1"'))
    assert json.loads(data) == [{"a": "ä"}] * 2
    assert "etag" not in headers


async def test_compressed_json_is_rewritten_behind_a_decoder() -> None:
    data, headers = await answered(
        gzip.compress(b"1"), "application/json", JsonLayer(response=doubled), ("Content-Encoding", "gzip")
    )
    assert (data, headers.get("content-encoding")) == (b"[1,1]", None)


@pytest.mark.parametrize(
    ("data", "kind", "field"),
    [
        (b"{oops", "application/json", ("ETag", '"1"')),
        (b"[" * 100_000, "application/json", ("ETag", '"1"')),
        (b'{"a": 1}', "text/plain", ("ETag", '"1"')),
        (b'{"a": 1}', "application/json", ("Cache-Control", "no-transform")),
        (b'{"a": 1}', "application/json", ("Content-Encoding", "unknown")),
        (b'{"a": 1}', "application/json", ("Content-Range", "bytes 0-7/100")),
    ],
)
async def test_what_is_no_json_goes_on_byte_for_byte(data: bytes, kind: str, field: tuple[str, str]) -> None:
    found, headers = await answered(data, kind, JsonLayer(response=doubled), field)
    assert (found, headers.get(field[0])) == (data, field[1])


async def test_bodies_above_the_bound_are_refused_in_both_directions() -> None:
    with pytest.raises(HttpError, match="too large") as refused:
        await answered(b'"' + bytes(100) + b'"', "application/json", JsonLayer(response=doubled, max_body=64))
    assert refused.value.status == 502

    async def app(request: Request) -> Response:
        return Response(200, Headers(), Body.of(await request.body.read(1000)))

    layer = JsonLayer(request=doubled, max_body=64)
    response = await stack(layer, app)(request(b"1", Content_Type="application/json"))
    assert await response.body.read(100) == b"[1,1]"
    with pytest.raises(HttpError, match="too large") as refused:
        await stack(layer, app)(request(b'"' + bytes(100) + b'"', Content_Type="application/json"))
    assert refused.value.status == 413
    with pytest.raises(ValueError, match="nothing to rewrite"):
        JsonLayer()

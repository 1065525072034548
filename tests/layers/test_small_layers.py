"""Catch, map, add-extension, count, trace."""

from __future__ import annotations

import logging

import pytest

from rama_ebpf.core import Authority, LimitExceeded, ProtocolError, StackError, Stream, stack
from rama_ebpf.layers.catch import CatchLayer
from rama_ebpf.layers.count import ByteCounter, ByteCountLayer
from rama_ebpf.layers.mapping import AddExtensionLayer, MapInputLayer, MapOutputLayer
from rama_ebpf.layers.trace import TraceLayer

from .conftest import Serve, echo


async def double(number: int) -> int:
    return number * 2


async def fail(number: int) -> int:
    raise ProtocolError(f"no {number}")


async def say_sorry(input: int, error: Exception) -> str:
    return f"{input}: {error}"


async def test_catch_turns_a_named_error_into_an_answer() -> None:
    assert await stack(CatchLayer(say_sorry, ProtocolError), fail)(3) == "3: no 3"


async def test_catch_lets_other_errors_pass() -> None:
    with pytest.raises(ProtocolError):
        await stack(CatchLayer(say_sorry, LimitExceeded), fail)(3)


async def test_map_changes_input_and_output() -> None:
    service = stack(MapOutputLayer(str), MapInputLayer(int, accepts=str, provides=int), double)
    assert await service("21") == "42"


def test_map_with_declared_types_is_checked_when_composed() -> None:
    with pytest.raises(StackError, match=r"MapInputLayer hands on Authority, but double takes int"):
        stack(MapInputLayer(lambda text: Authority.of(text, 1), accepts=str, provides=Authority), double)


def test_map_with_half_a_declaration_is_refused() -> None:
    with pytest.raises(ValueError, match="both"):
        MapInputLayer(int, accepts=str)


class Tenant(str):
    pass


async def test_added_extensions_are_seen_inside(serve: Serve) -> None:
    async def whose(stream: Stream) -> str:
        return stream.extensions.require(Tenant)

    server = await serve(stack(AddExtensionLayer(Tenant("acme")), whose))
    await server.open()
    assert await server.outcome() == "acme"


async def test_bytes_are_counted_while_streams_live_and_after(serve: Serve) -> None:
    counter = ByteCounter()
    server = await serve(stack(ByteCountLayer(counter), echo))
    first, second = await server.open(), await server.open()
    await first.ask(b"12345")
    await second.ask(b"123")
    assert (counter.received, counter.sent) == (8, 8)
    first.writer.close()
    await server.outcome()
    await second.ask(b"12")
    assert (counter.received, counter.sent) == (10, 10)


async def test_trace_tells_calls_apart_and_names_the_service(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "rama_ebpf.trace")
    service = stack(TraceLayer(), double)
    await service(1)
    await service(2)
    assert [record.message.rpartition(" after")[0] or record.message for record in caplog.records] == [
        "double #1: called with 1",
        "double #1: returned 2",
        "double #2: called with 2",
        "double #2: returned 4",
    ]


async def test_trace_logs_what_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "rama_ebpf.trace")
    with pytest.raises(ProtocolError):
        await stack(TraceLayer("inner"), fail)(1)
    assert "inner #1: raised ProtocolError('no 1')" in caplog.text


async def test_trace_that_is_off_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert await stack(TraceLayer(), double)(4) == 8
    assert caplog.records == []

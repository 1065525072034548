from __future__ import annotations

import pytest

from rama_ebpf.core import Authority, Service, StackError, Stream, service_fn, stack
from rama_ebpf.layers.concurrency import ConcurrencyLimitLayer
from rama_ebpf.layers.timeout import TimeoutLayer
from rama_ebpf.services.http import HttpServer
from rama_ebpf.services.socks5 import Socks5Server


async def on_stream(stream: Stream) -> str:
    return "stream"


async def on_authority(target: Authority) -> str:
    return "authority"


class Label:
    """A layer that writes down the order in which calls pass."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def __call__(self, inner: Service[object, object]) -> Service[object, object]:
        async def serve(input: object) -> object:
            self.seen.append(self.name)
            return await inner(input)

        return serve


async def test_layers_apply_outermost_first() -> None:
    seen: list[str] = []
    service = stack(Label("outer", seen), Label("inner", seen), service_fn(on_authority))
    assert await service(Authority.of("a", 1)) == "authority"
    assert seen == ["outer", "inner"]


def test_layer_for_streams_around_a_service_for_authorities_is_refused_by_name() -> None:
    with pytest.raises(StackError, match=r"TimeoutLayer hands on Stream, but on_authority takes Authority"):
        stack(TimeoutLayer(), on_authority)


def test_a_misfit_is_found_through_layers_of_any_type() -> None:
    with pytest.raises(StackError, match=r"TimeoutLayer hands on Stream, but ConcurrencyLimitLayer takes Authority"):
        stack(TimeoutLayer(), ConcurrencyLimitLayer(1), on_authority)


def test_a_misfit_inside_is_named_by_the_layer_not_by_its_closure() -> None:
    class Decrypt:
        accepts = Stream
        provides = Authority

        def __call__(self, inner: Service[Authority, str]) -> Service[Stream, str]:
            return on_stream

    with pytest.raises(StackError, match=r"Decrypt hands on Authority, but TimeoutLayer takes Stream"):
        stack(Decrypt(), TimeoutLayer(), on_stream)


def test_a_service_inside_another_must_take_what_it_will_be_called_with() -> None:
    with pytest.raises(StackError, match=r"HttpServer hands on Request, but on_stream takes Stream"):
        HttpServer(on_stream)  # type: ignore[arg-type]
    with pytest.raises(StackError, match=r"Socks5Server hands on Target, but on_stream takes Stream"):
        Socks5Server(on_stream)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "at least a service"),
        ((TimeoutLayer(),), "is not async"),
        ((TimeoutLayer, on_stream), "TimeoutLayer is a class"),
        ((on_stream, on_stream), "on_stream is a service, but only the last part"),
        ((TimeoutLayer(), None), "must be a service"),
        ((None, on_stream), "None is not a layer"),
        ((lambda inner: None, on_stream), "returned None, which is not a service"),
    ],
)
def test_what_is_no_stack_is_refused(parts: tuple[object, ...], message: str) -> None:
    with pytest.raises(StackError, match=message):
        stack(*parts)

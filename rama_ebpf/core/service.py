"""Services and layers.

A **service** is an async callable that takes one input and returns one output; a plain ``async def`` is one.
A **layer** is a callable that takes a service and returns a service. :func:`stack` composes them, outermost first::

    stack(TraceLayer(), TimeoutLayer(handshake=10), Socks5Server(connector))

Parts may declare what they work on, so that a mistake shows when a stack is composed and not when a client comes:
a service (class or instance) by ``accepts``, a layer by ``accepts`` (its own input) and ``provides`` (what it hands
to the service inside; the same as ``accepts`` where it is not given). For a plain function the annotation of its
first parameter counts.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import typing
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from .errors import StackError

__all__ = ["Layer", "Service", "accepts_of", "check_fit", "name_of", "service_fn", "stack"]

In = TypeVar("In", contravariant=True)
Out = TypeVar("Out", covariant=True)
T_in = TypeVar("T_in")
T_out = TypeVar("T_out")


@runtime_checkable
class Service(Protocol[In, Out]):
    """An async callable from one input to one output."""

    def __call__(self, input: In, /) -> Awaitable[Out]: ...


@runtime_checkable
class Layer(Protocol):
    """A callable that wraps a service into another service.

    The types of both sides are checked by :func:`stack` from ``accepts`` and ``provides``; Python's type system
    cannot yet express a chain of arbitrary length (no higher-kinded variadics).
    """

    def __call__(self, inner: Service[Any, Any], /) -> Service[Any, Any]: ...


def service_fn(function: Callable[[T_in], Awaitable[T_out]], *, accepts: type | None = None) -> Service[T_in, T_out]:
    """Make a service of any callable that returns an awaitable, for example a lambda or a partial.

    ``accepts`` declares its input type for the check in :func:`stack`. An ``async def`` needs no wrapping.
    """

    @functools.wraps(function, updated=())
    async def call(input: T_in, /) -> T_out:
        return await function(input)

    if accepts is not None:
        call.accepts = accepts  # type: ignore[attr-defined]  # functions take attributes; mypy knows none
    return call


def name_of(part: object) -> str:
    """Return the name by which a service or layer is shown in errors, logs and metrics."""
    name = getattr(part, "__qualname__", None)
    return str(name) if name is not None else type(part).__name__


def _is_async(part: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(part) or inspect.iscoroutinefunction(type(part).__call__)


def _first_annotation(function: object) -> type | None:
    try:
        signature = inspect.signature(cast("Callable[..., object]", function))
        hints = typing.get_type_hints(function)
    except (TypeError, ValueError, NameError):
        return None  # builtins and forward references to names that are not importable carry no usable annotation
    for parameter in signature.parameters.values():
        hint = hints.get(parameter.name)
        origin = typing.get_origin(hint) or hint
        # Any is a class since Python 3.11, and a protocol with attributes cannot be checked by issubclass().
        if not isinstance(origin, type) or origin is Any or getattr(origin, "_is_protocol", False):
            return None
        return origin
    return None


def accepts_of(service: object) -> type | None:
    """Return the input type that a service declares, or None if it declares none."""
    declared = getattr(service, "accepts", None)
    if isinstance(declared, type):
        return declared
    if inspect.isfunction(service) or inspect.ismethod(service):
        return _first_annotation(service)
    return None


def check_fit(outer: object, provided: type, inner: object) -> None:
    """Say that ``outer`` will call the service ``inner`` with a ``provided``, for a service that is given another one.

    Raises :class:`StackError`, naming both, if ``inner`` declares that it takes something else.
    """
    _check_fit(outer, provided, inner, accepts_of(inner))


def _check_fit(outer: object, provided: type | None, inner: object, wanted: type | None) -> None:
    if provided is None or wanted is None or wanted is object or issubclass(provided, wanted):
        return
    raise StackError(
        f"{name_of(outer)} hands on {provided.__name__}, but {name_of(inner)} takes {wanted.__name__}: "
        f"put the layer or service that turns the one into the other between them"
    )


def stack(*parts: Any) -> Service[Any, Any]:
    """Compose layers around a service, outermost first; the last part is the service.

    Raises :class:`StackError`, naming the part, if the last part is not a service, an earlier one is not a layer, a
    layer returns something that cannot be called, or the types that two neighbours declare do not fit.
    """
    if not parts:
        raise StackError("stack() needs at least a service")
    *layers, service = parts
    if not callable(service):
        raise StackError(f"the last part of a stack must be a service (an async callable), not {service!r}")
    if isinstance(service, type):
        raise StackError(f"{name_of(service)} is a class: put an instance of it into the stack")
    if not _is_async(service):
        raise StackError(
            f"the last part of a stack must be a service, but {name_of(service)} is not async: "
            f"is it a layer, or a callable that needs service_fn()?"
        )
    composed: Service[Any, Any] = service
    inner: object = service
    for layer in reversed(layers):
        if isinstance(layer, type):
            raise StackError(f"{name_of(layer)} is a class: put an instance of it into the stack")
        if not callable(layer):
            raise StackError(f"{layer!r} is not a layer: a layer is a callable that takes a service")
        if _is_async(layer):
            raise StackError(f"{name_of(layer)} is a service, but only the last part of a stack can be one")
        takes = getattr(layer, "accepts", None)
        provided = getattr(layer, "provides", None) or takes
        inner_accepts = accepts_of(composed)
        _check_fit(layer, provided if isinstance(provided, type) else None, inner, inner_accepts)
        composed = layer(composed)
        if not callable(composed):
            raise StackError(f"{name_of(layer)} returned {composed!r}, which is not a service")
        # A layer's result takes what the layer takes, or else what the wrapped service took.
        outer_accepts = takes if isinstance(takes, type) else inner_accepts
        if outer_accepts is not None and accepts_of(composed) is None:
            # An object with slots takes no attribute: then the chain is checked no further outwards, which is safe.
            with contextlib.suppress(AttributeError):
                composed.accepts = outer_accepts  # type: ignore[attr-defined]
        inner = layer
    return composed

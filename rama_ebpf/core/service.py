"""Services and layers.

A **service** is an async callable that takes one input and returns one output; a plain ``async def`` is one.
A **layer** is a callable that takes a service and returns a service. :func:`stack` composes them, outermost first::

    stack(TraceLayer(), TimeoutLayer(handshake=10), Socks5Server(connector))

Parts may declare what they work on, so that a mistake shows when a stack is composed and not when a client comes:
a service (class or instance) by ``accepts``, a layer by ``accepts`` (its own input) and ``provides`` (what it hands
to the service inside; the same as ``accepts`` where it is not given). For a plain function the annotation of its
first parameter counts. What must be among the extensions of the input is declared by ``needs``, what a layer adds to
them by ``adds``: tuples of types.

Type checkers follow a stack of up to eight parts: they know its input and its output, and see which neighbours do not
fit.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import typing
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeVar, cast, overload, runtime_checkable

from .adoption import adopts_of, with_layer
from .at_once import at_once_of
from .errors import StackError
from .first_bytes import FirstBytes

__all__ = [
    "Input",
    "Layer",
    "Output",
    "Service",
    "accepts_of",
    "check_complete",
    "check_fit",
    "check_key",
    "innermost",
    "name_of",
    "needs_of_all",
    "service_fn",
    "stack",
]

In = TypeVar("In", contravariant=True)
Out = TypeVar("Out", covariant=True)
Input = TypeVar("Input")
"""The input of a layer that works on any."""
Output = TypeVar("Output")
"""The output of a layer that hands on the one of the service inside."""
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
I0 = TypeVar("I0")
O0 = TypeVar("O0")
I1 = TypeVar("I1")
O1 = TypeVar("O1")
I2 = TypeVar("I2")
O2 = TypeVar("O2")
I3 = TypeVar("I3")
O3 = TypeVar("O3")
I4 = TypeVar("I4")
O4 = TypeVar("O4")
I5 = TypeVar("I5")
O5 = TypeVar("O5")
I6 = TypeVar("I6")
O6 = TypeVar("O6")
I7 = TypeVar("I7")
O7 = TypeVar("O7")


@runtime_checkable
class Service(Protocol[In, Out]):
    """An async callable from one input to one output."""

    def __call__(self, input: In, /) -> Awaitable[Out]: ...


_Wraps = Callable[[Service[A, B]], Service[C, D]]
"""A layer from the input and output of the service inside to its own."""


@runtime_checkable
class Layer(Protocol):
    """A callable that wraps a service into another service.

    The types of both sides are checked by :func:`stack` from ``accepts`` and ``provides``. This protocol is for lists
    of layers; a layer's own ``__call__`` says more, for example that it takes and returns a
    ``Service[Stream, Output]``.
    """

    def __call__(self, inner: Service[Any, Any], /) -> Service[Any, Any]: ...


def service_fn(
    function: Callable[[Input], Awaitable[Output]], *, accepts: type | None = None
) -> Service[Input, Output]:
    """Make a service of any callable that returns an awaitable, for example a lambda or a partial.

    ``accepts`` declares its input type for the check in :func:`stack`. An ``async def`` needs no wrapping.
    """

    @functools.wraps(function, updated=())
    async def call(input: Input, /) -> Output:
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
    """Check a service that ``outer`` is given and will call with a ``provided``.

    Raises :class:`StackError`, naming both, if ``inner`` is not a service, or declares that it takes something else.
    """
    if isinstance(inner, type):
        raise StackError(
            f"{name_of(outer)} is given the class {name_of(inner)}: give it an instance, {name_of(inner)}(…)"
        )
    if not callable(inner):
        raise StackError(f"{name_of(outer)} is given {inner!r} where it needs a service (an async callable)")
    if not _is_async(inner):
        raise StackError(
            f"{name_of(outer)} is given {name_of(inner)}, which is not async: write it with async def, "
            f"or wrap what returns an awaitable in service_fn()"
        )
    _check_fit(outer, provided, inner, accepts_of(inner))


def check_key(outer: object, key: object) -> None:
    """Check a function that ``outer`` is given to tell inputs apart. Raises :class:`StackError` if it cannot be called,
    or is async."""
    if key is not None and (not callable(key) or isinstance(key, type) or _is_async(key)):
        raise StackError(
            f"{name_of(outer)} is given the key {key!r}: give it a plain function, by_source() for example"
        )


def needs_of(service: object) -> tuple[type, ...]:
    """Return what must be among the extensions of the input of a service."""
    declared = getattr(service, "needs", ())
    return declared if isinstance(declared, tuple) else ()


def needs_of_all(services: Iterable[object]) -> tuple[type, ...]:
    """Return what must be among the extensions of the input of whoever chooses among ``services``."""
    return tuple(dict.fromkeys(kind for service in services for kind in needs_of(service)))


def check_complete(outer: object, service: object) -> None:
    """Check that a service, which ``outer`` will call, needs nothing that nobody adds. Raises :class:`StackError`."""
    if missing := needs_of(service):
        raise _missing(outer, service, missing)


def _missing(outer: object, part: object, missing: tuple[type, ...]) -> StackError:
    wanted = " and ".join(sorted(kind.__name__ for kind in missing))
    return StackError(
        f"{name_of(part)} needs {wanted} among the extensions, and nothing outside it adds that in {name_of(outer)}: "
        f"put the layer that does (TlsPeekLayer for a ClientHello) before it"
    )


def _check_fit(outer: object, provided: type | None, inner: object, wanted: type | None) -> None:
    if provided is None or wanted is None or wanted is object or issubclass(provided, wanted):
        return
    raise StackError(
        f"{name_of(outer)} hands on {provided.__name__}, but {name_of(inner)} takes {wanted.__name__}: "
        f"put the layer or service that turns the one into the other between them"
    )


def _hand_outwards(look: FirstBytes | None, layer: object, composed: object) -> None:
    """Give ``composed`` what its layer makes of the judge of first bytes inside it, see there."""
    through: Callable[[FirstBytes | None], FirstBytes | None] | None = getattr(layer, "first_bytes", None)
    found = None if through is None else through(look)
    if found is not None:
        with contextlib.suppress(AttributeError):  # an object with slots: then no bytes are judged beforehand
            composed.first_bytes = found  # type: ignore[attr-defined]


@overload
def stack(
    service: Service[I0, O0],
    /,
    *,
    given: tuple[type, ...] = (),
) -> Service[I0, O0]: ...
@overload
def stack(
    layer1: _Wraps[I0, O0, I1, O1],
    service: Service[I0, O0],
    /,
    *,
    given: tuple[type, ...] = (),
) -> Service[I1, O1]: ...
@overload
def stack(
    layer2: _Wraps[I1, O1, I2, O2],
    layer1: _Wraps[I0, O0, I1, O1],
    service: Service[I0, O0],
    /,
    *,
    given: tuple[type, ...] = (),
) -> Service[I2, O2]: ...
@overload
def stack(
    layer3: _Wraps[I2, O2, I3, O3],
    layer2: _Wraps[I1, O1, I2, O2],
    layer1: _Wraps[I0, O0, I1, O1],
    service: Service[I0, O0],
    /,
    *,
    given: tuple[type, ...] = (),
) -> Service[I3, O3]: ...
@overload
def stack(
    layer4: _Wraps[I3, O3, I4, O4],
    layer3: _Wraps[I2, O2, I3, O3],
    layer2: _Wraps[I1, O1, I2, O2],
    layer1: _Wraps[I0, O0, I1, O1],
    service: Service[I0, O0],
    /,
    *,
    given: tuple[type, ...] = (),
) -> Service[I4, O4]: ...
@overload
def stack(
    layer5: _Wraps[I4, O4, I5, O5],
    layer4: _Wraps[I3, O3, I4, O4],
    layer3: _Wraps[I2, O2, I3, O3],
    layer2: _Wraps[I1, O1, I2, O2],
    layer1: _Wraps[I0, O0, I1, O1],
    service: Service[I0, O0],
    /,
    *,
    given: tuple[type, ...] = (),
) -> Service[I5, O5]: ...
@overload
def stack(
    layer6: _Wraps[I5, O5, I6, O6],
    layer5: _Wraps[I4, O4, I5, O5],
    layer4: _Wraps[I3, O3, I4, O4],
    layer3: _Wraps[I2, O2, I3, O3],
    layer2: _Wraps[I1, O1, I2, O2],
    layer1: _Wraps[I0, O0, I1, O1],
    service: Service[I0, O0],
    /,
    *,
    given: tuple[type, ...] = (),
) -> Service[I6, O6]: ...
@overload
def stack(
    layer7: _Wraps[I6, O6, I7, O7],
    layer6: _Wraps[I5, O5, I6, O6],
    layer5: _Wraps[I4, O4, I5, O5],
    layer4: _Wraps[I3, O3, I4, O4],
    layer3: _Wraps[I2, O2, I3, O3],
    layer2: _Wraps[I1, O1, I2, O2],
    layer1: _Wraps[I0, O0, I1, O1],
    service: Service[I0, O0],
    /,
    *,
    given: tuple[type, ...] = (),
) -> Service[I7, O7]: ...
@overload
def stack(
    part1: Any,
    part2: Any,
    part3: Any,
    part4: Any,
    part5: Any,
    part6: Any,
    part7: Any,
    part8: Any,
    part9: Any,
    /,
    *parts: Any,
    given: tuple[type, ...] = (),
) -> Service[Any, Any]: ...
def stack(*parts: Any, given: tuple[type, ...] = ()) -> Service[Any, Any]:
    """Compose layers around a service, outermost first; the last part is the service.

    Raises :class:`StackError`, naming the part, if the last part is not a service, an earlier one is not a layer, a
    layer returns something that cannot be called, the types that two neighbours declare do not fit, or a part needs an
    extension that no part outside it adds. ``given`` says what is added outside of this stack, for one that goes into
    another.
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
    needed = {kind: service for kind in needs_of(service)}
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
        look, way = getattr(composed, "first_bytes", None), at_once_of(composed)
        adopts = with_layer(layer, adopts_of(composed))
        composed = layer(composed)
        if not callable(composed):
            raise StackError(f"{name_of(layer)} returned {composed!r}, which is not a service")
        _hand_outwards(look, layer, composed)
        if adopts:
            with contextlib.suppress(AttributeError):  # an object with slots: then nothing is adopted inside
                composed.adopts = adopts  # type: ignore[attr-defined]
        if way is not None and (outer := way.inside(layer, composed)) is not None:
            with contextlib.suppress(AttributeError):  # an object with slots: then each connection has a task
                composed.at_once = outer  # type: ignore[attr-defined]
        # A layer's result takes what the layer takes, or else what the wrapped service took.
        outer_accepts = takes if isinstance(takes, type) else inner_accepts
        if outer_accepts is not None and accepts_of(composed) is None:
            # An object with slots takes no attribute: then the chain is checked no further outwards, which is safe.
            with contextlib.suppress(AttributeError):
                composed.accepts = outer_accepts  # type: ignore[attr-defined]
        for added in getattr(layer, "adds", ()):
            needed.pop(added, None)
        needed.update((kind, layer) for kind in needs_of(layer))
        inner = layer
    missing = tuple(kind for kind in needed if kind not in given)
    if missing:
        raise _missing(stack, needed[missing[0]], missing)
    if composed is not service:
        with contextlib.suppress(AttributeError):
            composed.innermost = innermost(service)  # type: ignore[attr-defined]
    return composed


def innermost(service: object) -> object:
    """Return the service that :func:`stack` composed ``service`` around; what it did not compose is its own."""
    return getattr(service, "innermost", service)

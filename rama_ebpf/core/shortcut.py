"""Methods that do at once what a call does in a coroutine, and must speak for that very call."""

from __future__ import annotations

from typing import Any

__all__ = ["shortcut_of"]


def shortcut_of(thing: object, name: str) -> Any:
    """Return the method ``name`` of a service, layer or authenticator, None if it has none of its own.

    What stands around it must not be passed by: a function has none, and a class that inherits one and has a
    ``__call__`` of its own does more than that method says.
    """
    for kind in type(thing).__mro__:
        if name in vars(kind):
            return getattr(thing, name)
        if "__call__" in vars(kind):
            return None
    return None

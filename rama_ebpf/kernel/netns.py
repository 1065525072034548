"""Network namespaces by name (ip-netns(8)): work that is to be done inside of one."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

__all__ = ["call_inside"]

T = TypeVar("T")

_NAMESPACES: Final = Path("/run/netns")
_CLONE_NEWNET: Final = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def call_inside(namespace: str, function: Callable[[], T]) -> T:
    """Run a function in a thread that lives inside; sockets that it makes stay inside (setns(2)). Raises what it does,
    and OSError where the namespace cannot be entered."""
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            with open(_NAMESPACES / namespace, "rb") as file:
                if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, f"cannot enter network namespace {namespace}: {os.strerror(number)}")
            results.append(function())
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]

"""Where the policy of an instance is: in pinned maps, which any process with the right to may change, or in its server.

One function runs a method of :class:`~.api.ControlApi` there, for the commands and for :mod:`rama_ebpf.gate` alike.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Mapping
from typing import Final, cast

from ..kernel.gate_maps import LayoutMismatch
from ..kernel.guard_registry import guarding_pids
from ..kernel.instance import Instance
from ..kernel.witness import Witness
from ..policy.feed_store import FeedStore
from ..policy.kernel_store import KernelStore
from ..policy.local import LocalStore
from ..policy.rule import PolicyError
from . import socket as control
from .api import ControlApi, Json
from .enforced import Judge, KernelJudge, StoreJudge

__all__ = ["NotLoaded", "call"]


class NotLoaded(PolicyError):
    """No policy of this instance is in the kernel, and no server of it answers."""


_SLOW: Final = {"load": 600.0, "diff": 600.0, "refresh": 600.0}
"""Methods that may read feeds: seconds to wait for the server's answer."""
_OF_ONE_SOURCE: Final = ("add", "remove", "ban", "test")
_PORTION: Final = 1000
"""Sources in a request to a server."""
_START_SECONDS: Final = 10.0
"""How long a server that is starting may take to say where its policy lives."""


class _Apart(Exception):
    """The pins are not those that the running server uses."""


def call(instance: Instance, method: str, params: Mapping[str, object]) -> Json:
    """Run a control method where the instance's policy lives: on the pinned maps, or in its server.

    Raises :class:`NotLoaded` if the instance is not loaded, and :class:`PolicyError` if its pins cannot be used and no
    server holds them.
    """
    pid = instance.serving_pid()
    if instance.pinned and _told_by_server(instance, pid).get("policy") != "local":
        try:
            return _on_pins(instance, method, params)
        except _Apart:
            pass  # what the server uses is what counts, and it is asked
        except (FileNotFoundError, LayoutMismatch) as error:
            if pid is None:
                raise PolicyError(
                    f"the pins of instance {instance.name!r} cannot be used: {error} (the next start rebuilds them "
                    "from disk; rama-ebpf unload forgets the policy)"
                ) from error
    if instance.control_socket.exists():
        return _over_socket(instance, method, params)
    if pid is not None:
        _check_input(method, params)
        raise NotLoaded(f"instance {instance.name!r} is being started by process {pid or 'unknown'}: try again soon")
    _check_input(method, params)
    raise NotLoaded(f"instance {instance.name!r} is not loaded: start it with rama-ebpf run")


def _over_socket(instance: Instance, method: str, params: Mapping[str, object]) -> Json:
    """A request is a line of bounded length: many sources are asked for in portions, each of which is one change."""
    timeout, sources = _SLOW.get(method, 10.0), params.get("sources")
    if not isinstance(sources, list) or len(sources) <= _PORTION:
        return control.call(instance.control_socket, method, params, timeout=timeout)
    count, result = 0, Json()
    for at in range(0, len(sources), _PORTION):
        portion = {**params, "sources": sources[at : at + _PORTION]}
        result = control.call(instance.control_socket, method, portion, timeout=timeout)
        count += cast("int", result["count"])
    return result | {"count": count}


def _check_input(method: str, params: Mapping[str, object]) -> None:
    """Raise :class:`PolicyError` for what no policy would take: a mistake of the caller's is told before what is
    missing."""
    if method in _OF_ONE_SOURCE:
        ControlApi(LocalStore(max_entries=16)).call(method, params)


def _told_by_server(instance: Instance, pid: int | None) -> Mapping[str, object]:
    """What the live server says of itself: nothing if there is none, or it does not say."""
    deadline = time.monotonic() + _START_SECONDS
    while pid is not None:
        state = instance.read_state()
        if state.get("pid") == pid:
            return state
        if time.monotonic() >= deadline or not state:
            break
        time.sleep(0.05)  # it is starting: what is written there is of the server before it
        pid = instance.serving_pid()
    return {}


def _on_pins(instance: Instance, method: str, params: Mapping[str, object]) -> Json:
    """Run a method on the pinned maps. A server that starts or stops puts others in their place, or none: the store
    finds that out under the lock, and what is in force in those that are in use then is on disk for the next ones."""
    with KernelStore(instance) as store:
        api = ControlApi(store, FeedStore(instance.feeds_dir), _judge(instance, store), instance.clients_file)
        result = api.call(method, params)
    enforced = result.get("enforced")
    if isinstance(enforced, dict) and not enforced["serving"]:
        enforced["guards"] = sorted(guarding_pids(instance))  # they judge by these maps, with or without a server
    return result


def _judge(instance: Instance, store: KernelStore) -> Judge:
    """Who is asked what is decided: the running server's programs. Raises :class:`_Apart` if those use other maps."""
    pid = instance.serving_pid()
    if pid is None:
        return StoreJudge(store, serving=False)
    told = _told_by_server(instance, pid)
    maps, witness = told.get("maps"), told.get("witness")
    if isinstance(maps, int) and maps != store.counters.identity:
        raise _Apart

    def opened() -> contextlib.AbstractContextManager[Witness]:
        if not isinstance(witness, int):
            why = (
                "the server does not say who could be asked" if told else "the server is starting (test asks it later)"
            )
            raise OSError(errno.ENOENT, why)
        return Witness.of_server(witness, store.counters.identity)

    return KernelJudge(store, opened, lambda: told.get("listeners"))

"""The child process of :mod:`.fetch`: reads and parses one feed.

Started as ``python -m rama_ebpf.policy.fetch_child CHANNEL``. CHANNEL says what to read, as JSON, and is asked before
each connection (:mod:`.feed_room`). It writes a record (:mod:`.feed_record`) to standard output, or the reason why
there is none to standard error, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
from collections.abc import Mapping
from typing import Any, Final

from ..kernel.confine import NO_NETWORK, Network, confine
from ..kernel.own_addresses import local_networks
from ..kernel.privileges import UserIds, can_change_user, die_with_parent, drop_privileges, give_up_capabilities
from . import vectors
from .egress import EgressPolicy, OwnHost
from .feed import FeedContent, FeedError, parse_feed
from .feed_formats import FormatOptions
from .feed_record import HEAD_BYTES, V6_BYTES, encode
from .prefixes import Prefixes
from .unpacked import unpack

__all__ = ["confine_reader"]

_PYTHON_BYTES: Final = 512 * 1024 * 1024  # of addresses: most are libraries' and never touched
_SHORTEST_LINE: Final = 3  # "::" and a line feed
_ANSWER_BYTES: Final = 64 * 1024
_MOST_ADDRESSES: Final = 64


def confine_reader(channel: socket.socket, max_size: int, *, network: bool) -> None:
    """Give up all privileges, and the means to fill memory or to start anything."""
    if os.geteuid() == 0 and can_change_user():
        drop_privileges(UserIds.of_workers())
    else:  # a user without privileges, or root in a container that gives it none
        give_up_capabilities()
    die_with_parent()
    for limit, value in (
        (resource.RLIMIT_FSIZE, max_size * V6_BYTES // _SHORTEST_LINE + HEAD_BYTES),
        (resource.RLIMIT_AS, 8 * max_size + _PYTHON_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    confinement = confine(closed=Network.BIND if network else NO_NETWORK, listener=True)  # as far as the host can
    if confinement.listener is not None:
        _ask(channel, listener=confinement.listener)  # it has it, or does not count
        os.close(confinement.listener)


def _ask(channel: socket.socket, **what: object) -> str:
    """Ask, and return why not, or nothing."""
    channel.sendall(json.dumps(what).encode())
    return str(json.loads(channel.recv(_ANSWER_BYTES))["refusal"])


def _prepare(data: bytes) -> None:
    """Import what many lines are parsed with, while files can be opened."""
    if len(data) > vectors.MANY:  # packed they may be many lines
        vectors.numpy()


def _close_off() -> None:
    """Open nothing any more, neither files nor connections: what follows parses strangers' bytes."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def _fail(error: str, retry_after: float | None = None) -> SystemExit:
    return SystemExit(json.dumps({"error": error, "retry_after": retry_after}))


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    wanted = json.loads(channel.recv(_ANSWER_BYTES))
    egress = _egress() if "url" in wanted else None  # asks the kernel over a socket that is forbidden afterwards
    confine_reader(channel, wanted["max_size"], network=egress is not None)
    try:
        record = _read_file(wanted) if egress is None else _fetch(wanted, egress, channel)
    except (FeedError, ValueError) as error:
        raise _fail(str(error)) from None
    except MemoryError:
        raise _fail("parsing it takes more memory than is allowed") from None
    sys.stdout.buffer.write(record)


def _read_file(wanted: Mapping[str, Any]) -> bytes:
    try:
        with open(wanted["file"], "rb") as file:
            data = file.read(wanted["max_size"] + 1)
    except OSError as error:
        raise _fail(f"cannot be read: {error.strerror}") from None
    _prepare(data)
    _close_off()
    content = parse_feed(unpack(data, wanted["max_size"]), max_bad=wanted["max_bad"], **_format(wanted))
    return encode(content, unchanged=False, validators={})


def _format(wanted: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: text for name, text in wanted["format"].items() if name != "format"}
    return {"format": wanted["format"]["format"], "options": FormatOptions(**options)}


def _egress() -> EgressPolicy:
    """Where redirects may lead: to what is public, and not this host."""
    try:
        return EgressPolicy(host=OwnHost(local_networks()))
    except OSError as error:
        raise _fail(f"cannot tell this host's own addresses, where no redirect may lead: {error}") from None


def _fetch(wanted: Mapping[str, Any], egress: EgressPolicy, channel: socket.socket) -> bytes:
    from .http_get import GetError, get  # late: a file needs none of it

    def ask(host: str, port: int, addresses: list[str]) -> None:
        if refusal := _ask(channel, host=host, port=port, addresses=addresses[:_MOST_ADDRESSES]):
            raise OSError(f"refusing to connect to {host}: {refusal}")

    try:
        with contextlib.closing(get(wanted["url"], wanted["validators"], wanted["timeout"], egress, ask)) as response:
            data = response.read(wanted["max_size"])
    except GetError as error:
        raise _fail(str(error), error.retry_after) from None
    _prepare(data or b"")
    _close_off()
    validators = response.validators or wanted["validators"]
    if data is None:
        return encode(FeedContent(Prefixes(), 0), unchanged=True, validators=validators)
    # Nothing of a page may get into an error: a redirect, or a mistaken URL, could name one that is not for everybody.
    content = parse_feed(unpack(data, wanted["max_size"]), max_bad=wanted["max_bad"], quote=False, **_format(wanted))
    return encode(content, unchanged=False, validators=validators)


if __name__ == "__main__":
    main()

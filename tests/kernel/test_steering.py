"""A connection goes to the socket that its source and port choose, and to no other of the group."""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address

import pytest

from rama_ebpf import loader
from rama_ebpf.kernel.instance import Instance

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT, SOCKETS, CONNECTIONS = 1080, 3, 120


@pytest.fixture
def gate(instance: str) -> Iterator[loader.Gate]:
    place = Instance(instance)
    place.run_dir.mkdir(parents=True)
    gate = loader.load(place)
    try:
        gate.attach()
        yield gate
    finally:
        gate.close()


def _slot(source: IPv4Address, port: int) -> int:
    """What ``socket_slot`` of bpf/sockets.h says: the address as this machine reads the wire's bytes."""
    mixed = int.from_bytes(source.packed, sys.byteorder) * 0x85EBCA6B & 0xFFFFFFFF
    return ((mixed ^ port) * 0x9E3779B1 & 0xFFFFFFFF) // 65536 % SOCKETS


def test_connection_reaches_exactly_the_socket_that_was_chosen(gate: loader.Gate) -> None:
    """All sockets are of one REUSEPORT group, whose own hash would spread them another way."""
    with ExitStack() as stack:
        listeners = []
        for _ in range(SOCKETS):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("127.0.0.1", PORT))
            sock.listen(CONNECTIONS)
            listeners.append(sock)
        gate.add_listener(listeners)
        wanted: list[set[int]] = [set() for _ in listeners]
        for number in range(CONNECTIONS):
            source = f"127.0.0.{2 + number % 5}"
            client = stack.enter_context(socket.socket())
            client.bind((source, 0))
            client.connect(("127.0.0.1", PORT))
            port = client.getsockname()[1]
            wanted[_slot(IPv4Address(source), port)].add(port)
        reached: list[set[int]] = [set() for _ in listeners]
        while ready := select.select(listeners, [], [], 0)[0]:
            for sock in ready:
                accepted, (_, port) = sock.accept()
                accepted.close()
                reached[listeners.index(sock)].add(port)
        assert reached == wanted
        assert all(reached), "every socket had some"

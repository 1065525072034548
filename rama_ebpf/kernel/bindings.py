"""Which listener has which addresses and ports, as the programs look it up: ``bpf/lookup.h``, ``find_binding``.

A prefix leads to the number of a table of ports, and a table and port to a listener's id. Both are tries (LPM). A new
state is put beside the old one, table by table, and each prefix then goes over to its new table in one step; so what is
bound before and afterwards is bound all the time. :meth:`Bindings.mend` puts right what others have changed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, ip_address, summarize_address_range

from ..core.address import SocketAddress, mapped, unmap
from ..core.binding import Binding, PortRange, port_tables
from . import abi, bpf
from .gate_maps import GateMaps

__all__ = ["Bindings", "bound_examples", "forget_bindings"]

_Entries = dict[bytes, bytes]


class Bindings:
    """The two tries of a gate. One thread at a time changes them."""

    def __init__(self, maps: GateMaps) -> None:
        self._prefixes = maps["bindings"]
        self._ports = maps["bound_ports"]
        self._wanted: tuple[_Entries, _Entries] = ({}, {})
        self._next_table = 1

    def adopt(self) -> None:
        """Go on with what another process has put there."""
        self._wanted = _entries(self._prefixes, abi.BINDING_KEY.size), _entries(self._ports, abi.PORT_KEY.size)
        tables = [int.from_bytes(value, sys.byteorder) for value in self._wanted[0].values()]
        self._next_table = 1 + max(tables, default=0)

    def put(self, bound: Sequence[tuple[Binding, int]], left_out: Sequence[SocketAddress] = ()) -> None:
        """Have the programs find these listeners, by their ids, and no others. ``left_out`` are the addresses of
        listeners without bindings. Raises ValueError if there is no room, or OSError; then it is to be put again."""
        prefixes: _Entries = {}
        ports: _Entries = {}
        tables: dict[tuple[tuple[PortRange, int], ...], int] = {}
        for network, table in port_tables(bound, left_out).items():
            if table not in tables:
                tables[table] = self._next_table
                self._next_table += 1
                for owned, listener in table:
                    value = listener.to_bytes(4, sys.byteorder)
                    ports.update(dict.fromkeys(_port_keys(tables[table], owned), value))
            version = network.version
            length = network.prefixlen + (96 if version == 4 else 0)
            key = abi.BINDING_KEY.pack(32 + length, version == 4, mapped(network.network_address))
            prefixes[key] = tables[table].to_bytes(4, sys.byteorder)
        constant = abi.constants()
        for what, entries, most in (
            ("prefixes", prefixes, constant["MAX_BOUND_PREFIXES"]),
            ("ranges of ports", ports, constant["MAX_BOUND_PORTS"] // 2),  # the old ones go when the new ones are there
        ):
            if len(entries) > most:
                raise ValueError(
                    f"the listeners' bindings have too many {what}: {len(entries)} entries, at most {most}"
                )
        self._wanted = prefixes, ports
        self.mend()

    def mend(self) -> bool:
        """Have the kernel's tries be what they are meant to be; return whether they were not. Raises OSError."""
        prefixes, ports = self._wanted
        found = _entries(self._prefixes, abi.BINDING_KEY.size)
        found_ports = _entries(self._ports, abi.PORT_KEY.size)
        if (found, found_ports) == (prefixes, ports):
            return False
        _write(self._ports, found_ports, ports)
        _write(self._prefixes, found, prefixes)
        for fd, there, wanted in ((self._prefixes, found, prefixes), (self._ports, found_ports, ports)):
            for key in there.keys() - wanted.keys():
                bpf.map_delete(fd, key)
        return True


def _write(fd: int, found: _Entries, wanted: Mapping[bytes, bytes]) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            bpf.map_update(fd, key, value)


def _port_keys(table: int, ports: PortRange) -> Iterator[bytes]:
    # A range of ports as prefixes: the standard library has that of IPv4 addresses.
    for network in summarize_address_range(IPv4Address(ports.first), IPv4Address(ports.last)):
        port = int(network.network_address)
        in_order = int.from_bytes(port.to_bytes(2, "big"), sys.byteorder)
        yield abi.PORT_KEY.pack(32 + network.prefixlen - 16, table, in_order, 0)


def _entries(fd: int, key_size: int) -> _Entries:
    """All of a trie, key by key: a look-up of many came to tries later."""
    found: _Entries = {}
    key = bpf.map_next_key(fd, None, key_size)
    while key is not None and key not in found:
        value = bpf.map_lookup(fd, key, 4)
        if value is not None:
            found[key] = value
        key = bpf.map_next_key(fd, key, key_size)
    return found


def forget_bindings(maps: Mapping[str, int]) -> None:
    """Empty both tries: their listeners died with an earlier server."""
    for name, size in (("bindings", abi.BINDING_KEY.size), ("bound_ports", abi.PORT_KEY.size)):
        for key in _entries(maps[name], size):
            bpf.map_delete(maps[name], key)


def bound_examples(maps: Mapping[str, int], port: int | None = None) -> list[SocketAddress]:
    """For each prefix an address and a port of each listener that is bound there; only such as have ``port``, if that
    is given."""
    from_table: dict[int, dict[int, int]] = {}
    for key, value in _entries(maps["bound_ports"], abi.PORT_KEY.size).items():
        length, table, in_order, _ = abi.PORT_KEY.unpack(key)
        first = int.from_bytes(in_order.to_bytes(2, sys.byteorder), "big")
        last = first + (1 << (48 - length)) - 1
        if port is not None and not first <= port <= last:
            continue
        listener = int.from_bytes(value, sys.byteorder)
        known = from_table.setdefault(table, {})
        known[listener] = port or min(first, known.get(listener, first))
    found = []
    for key, value in _entries(maps["bindings"], abi.BINDING_KEY.size).items():
        _, _, packed = abi.BINDING_KEY.unpack(key)
        ip = unmap(ip_address(packed))
        found += [SocketAddress(ip, at) for at in from_table.get(int.from_bytes(value, sys.byteorder), {}).values()]
    return found

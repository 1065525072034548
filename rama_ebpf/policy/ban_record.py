"""Bans as bytes: the key and the value that the kernel's map has, one by one or many in a block.

A block holds keys one after the other, and values one after the other. What is said of all of them (which have ended,
which services made) is read out of a column at once: a Python object for each of a million bans would take seconds.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Network, ip_network
from typing import Final

from ..core.address import IPAddress, mapped
from ..kernel import abi
from .prefixes import IPNetwork, Prefixes, unmap_network
from .rule import Action, Ban

__all__ = [
    "KEY_SIZE",
    "VALUE_SIZE",
    "BanBlock",
    "ban_key",
    "ban_network",
    "ban_value",
    "canonical",
    "is_automatic",
    "read_ban",
    "reason_text",
    "value_expires",
    "with_one_hit",
]

KEY_SIZE: Final = abi.BAN_KEY.size
VALUE_SIZE: Final = abi.BAN.size
MAX_REASON: Final = 63
"""Bytes of a ban's reason; more are cut off."""

_MAPPED: Final = b"\0" * 10 + b"\xff\xff"
_LENGTH_AT: Final = 16 if sys.byteorder == "little" else 19
"""Where in a key its length is: a byte, for there are 128 bits."""
_EXPIRES_AT: Final = 0
_AUTOMATIC_AT: Final = 28 if sys.byteorder == "little" else 31


def ban_key(network: IPNetwork) -> bytes:
    """Return the key of a ban. An IPv4 network is kept as its IPv4-mapped form."""
    length = network.prefixlen + (96 if network.version == 4 else 0)
    return abi.BAN_KEY.pack(mapped(network.network_address), length)


def ban_network(key: bytes) -> IPNetwork:
    """The inverse of :func:`ban_key`."""
    prefix, length = abi.BAN_KEY.unpack(key)
    return unmap_network(IPv6Network((prefix, length)))


def canonical(banned: IPAddress | IPNetwork) -> IPNetwork:
    """Return what a ban is of: IPv4 where it is IPv4-mapped, and on whatever interface (RFC 4007): no key says that."""
    return ban_network(ban_key(ip_network(banned)))


def reason_text(reason: str) -> bytes:
    """Return the reason as it is kept: 63 bytes of UTF-8 at most."""
    return reason.encode(errors="replace")[:MAX_REASON].decode(errors="ignore").encode()


def ban_value(ban: Ban) -> bytes:
    """Return the value of a ban; its reason is cut to 63 bytes."""
    text = reason_text(ban.reason)
    return abi.BAN.pack(ban.expires or 0, ban.created, ban.hits, ban.action, ban.automatic, text)


def read_ban(key: bytes, value: bytes) -> Ban:
    """Return the ban of a key and its value."""
    expires, created, hits, action, automatic, reason = abi.BAN.unpack(value)
    text = reason.rstrip(b"\0").decode(errors="replace")
    return Ban(ban_network(key), Action(action), expires or None, created, hits, text, bool(automatic))


def is_automatic(value: bytes) -> bool:
    """Whether a service made the ban of this value."""
    return bool(value[_AUTOMATIC_AT])


def value_expires(value: bytes) -> int:
    """Return when the ban of this value ends, in CLOCK_BOOTTIME nanoseconds; 0: never."""
    return int.from_bytes(value[_EXPIRES_AT : _EXPIRES_AT + 8], sys.byteorder)


@dataclass(frozen=True, slots=True)
class BanBlock:
    """Many bans."""

    keys: bytes
    values: bytes

    @classmethod
    def of(cls, rows: Iterable[tuple[bytes, bytes]]) -> BanBlock:
        """From (key, value) pairs."""
        pairs = list(rows)
        return cls(b"".join(key for key, _ in pairs), b"".join(value for _, value in pairs))

    @classmethod
    def alike(cls, sources: Prefixes, model: Ban) -> BanBlock:
        """Bans that differ from ``model`` by their source alone."""
        lengths = [length.to_bytes(4, sys.byteorder) for length in range(129)]
        keys = [
            _MAPPED + raw + lengths[length + 96] if version == 4 else raw + lengths[length]
            for version, raw, length in sources.addresses()
        ]
        return cls(b"".join(keys), ban_value(model) * len(keys))

    def __len__(self) -> int:
        return len(self.keys) // KEY_SIZE

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield key and value of each."""
        for key, at in zip(self.each_key(), range(0, len(self.values), VALUE_SIZE), strict=True):
            yield key, self.values[at : at + VALUE_SIZE]

    def each_key(self) -> list[bytes]:
        """Return the keys."""
        keys = self.keys
        return [keys[at : at + KEY_SIZE] for at in range(0, len(keys), KEY_SIZE)]

    def network(self, index: int) -> IPNetwork:
        """Return the network of one."""
        return ban_network(self.keys[index * KEY_SIZE : (index + 1) * KEY_SIZE])

    def cut(self, first: int, last: int) -> BanBlock:
        """Return those from index ``first`` up to ``last``, without it."""
        return BanBlock(
            self.keys[first * KEY_SIZE : last * KEY_SIZE], self.values[first * VALUE_SIZE : last * VALUE_SIZE]
        )

    def expires(self) -> array[int]:
        """Return when each ends, in CLOCK_BOOTTIME nanoseconds; 0: never."""
        column = bytearray(8 * len(self))
        for byte in range(8):
            column[byte::8] = self.values[_EXPIRES_AT + byte :: VALUE_SIZE]
        found = array("Q")
        found.frombytes(column)
        return found

    def with_expires(self, expires: array[int]) -> BanBlock:
        """Return the same with other ends."""
        column, values = expires.tobytes(), bytearray(self.values)
        for byte in range(8):
            values[_EXPIRES_AT + byte :: VALUE_SIZE] = column[byte::8]
        return BanBlock(self.keys, bytes(values))

    def automatic_flags(self) -> bytes:
        """Return a byte of each: not 0 if a service made it."""
        return self.values[_AUTOMATIC_AT::VALUE_SIZE]

    def automatic(self) -> int:
        """Return how many of them services made."""
        return len(self) - self.automatic_flags().count(0)

    def in_force(self, now: int) -> BanBlock:
        """Return those that have not ended."""
        expires = self.expires()
        if min((end for end in expires if end), default=now + 1) > now:
            return self
        return BanBlock.of(row for row, end in zip(self.rows(), expires, strict=True) if not end or end > now)

    def ended(self, now: int) -> list[bytes]:
        """Return the keys of those that have ended."""
        expires = self.expires()
        if min((end for end in expires if end), default=now + 1) > now:
            return []
        return [key for key, end in zip(self.each_key(), expires, strict=True) if end and end <= now]

    def lengths(self) -> set[tuple[int, int]]:
        """Return which (IP version, length of the IPv4-mapped form) they have."""
        keys = self.keys
        kinds = set(zip(keys[0::KEY_SIZE], keys[11::KEY_SIZE], keys[_LENGTH_AT::KEY_SIZE], strict=True))
        if all(first for first, _, _ in kinds):
            return {(6, length) for _, _, length in kinds}
        if (
            all((first, last) == (0, 0xFF) for first, last, _ in kinds)
            and not any(any(keys[byte::KEY_SIZE]) for byte in range(1, 10))
            and set(keys[10::KEY_SIZE]) == {0xFF}
        ):
            return {(4, length) for _, _, length in kinds}
        return {(4 if key.startswith(_MAPPED) else 6, key[_LENGTH_AT]) for key in self.each_key()}


def with_one_hit(value: bytes) -> bytes:
    """Return the value of a ban that has turned one SYN more away."""
    expires, created, hits, *rest = abi.BAN.unpack(value)
    return abi.BAN.pack(expires, created, hits + 1, *rest)

"""resolv.conf(5): which name servers this host asks, and how."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_address
from typing import Final

from .address import IPAddress

__all__ = ["MAX_NAME_SERVERS", "ResolvConf"]

MAX_NAME_SERVERS: Final = 8
"""Name servers that are used; those after them are not. (glibc: 3.)"""
_MAX_SEARCH: Final = 32
_MOST_MISTAKES: Final = 4


@dataclass(frozen=True)
class ResolvConf:
    """What a resolv.conf says. ``servers`` keep their zone (``fe80::1%eth0``); ``ndots`` is 0-15.

    A name with fewer dots than ``ndots`` is tried with each of ``search`` behind it before it is tried alone.
    """

    servers: tuple[IPAddress, ...] = (IPv4Address("127.0.0.1"),)
    search: tuple[str, ...] = field(default=())
    ndots: int = 1
    mistakes: tuple[str, ...] = field(default=(), compare=False)
    """What of it cannot be followed, in words."""

    @classmethod
    def parse(cls, text: str) -> ResolvConf:
        """Read the file's text. Like glibc, ignores what it cannot read; without a server this host is asked."""
        servers: list[IPAddress] = []
        search: tuple[str, ...] = ()
        ndots = 1
        mistakes: list[str] = []
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            words = line.partition("#")[0].partition(";")[0].split()
            if len(words) < 2:
                continue
            if words[0] == "nameserver":
                try:
                    servers.append(_address(words[1]))
                except ValueError:
                    mistakes.append(f"line {number}: {words[1][:64]!a} is no address")
            elif words[0] in ("search", "domain"):
                given = [word.strip(".").lower() for word in words[1:]]
                search = tuple(filter(None, given))[: 1 if words[0] == "domain" else _MAX_SEARCH]
            elif words[0] == "options":
                for option in words[1:]:
                    name, _, value = option.partition(":")
                    if name == "ndots" and value.isascii() and value.isdigit():
                        ndots = min(int(value[:9]), 15)
        if not servers:
            mistakes.append(f"it names no name server: {cls.servers[0]} is asked")
        found = tuple(dict.fromkeys(servers))
        if len(found) > MAX_NAME_SERVERS:
            mistakes.append(f"of {len(found)} name servers the first {MAX_NAME_SERVERS} are asked")
        return cls(found[:MAX_NAME_SERVERS] or cls.servers, search, ndots, tuple(mistakes[:_MOST_MISTAKES]))

    def candidates(self, name: str) -> list[str]:
        """Return the absolute names to look up for ``name``, in order, without a dot at the end."""
        if name.endswith("."):
            return [name[:-1]]
        searched = [f"{name}.{domain}" for domain in self.search]
        return [name, *searched] if name.count(".") >= self.ndots else [*searched, name]


def _address(text: str) -> IPAddress:
    """An address, also in the forms of inet_aton(3), as libc takes them. Raises ValueError."""
    try:
        return ip_address(text)
    except ValueError:
        try:
            return IPv4Address(socket.inet_aton(text))
        except OSError:
            raise ValueError(text) from None

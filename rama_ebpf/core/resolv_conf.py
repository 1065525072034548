"""resolv.conf(5): which name servers this host asks, and how."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_address
from typing import Final

from .address import IPAddress

__all__ = ["MAX_NAME_SERVERS", "ResolvConf"]

MAX_NAME_SERVERS: Final = 8
"""Name servers that are used; those after them are not. (glibc: 3.)"""
_MAX_SEARCH: Final = 32


@dataclass(frozen=True)
class ResolvConf:
    """What a resolv.conf says. ``servers`` keep their zone (``fe80::1%eth0``); ``ndots`` is 0-15.

    A name with fewer dots than ``ndots`` is tried with each of ``search`` behind it before it is tried alone.
    """

    servers: tuple[IPAddress, ...] = (IPv4Address("127.0.0.1"),)
    search: tuple[str, ...] = field(default=())
    ndots: int = 1

    @classmethod
    def parse(cls, text: str) -> ResolvConf:
        """Read the file's text. Like glibc, ignores what it cannot read; without a server this host is asked."""
        servers: list[IPAddress] = []
        search: tuple[str, ...] = ()
        ndots = 1
        for line in text.removeprefix("\ufeff").splitlines():
            words = line.partition("#")[0].partition(";")[0].split()
            if len(words) < 2:
                continue
            if words[0] == "nameserver":
                with contextlib.suppress(ValueError):
                    servers.append(ip_address(words[1]))
            elif words[0] in ("search", "domain"):
                given = [word.strip(".").lower() for word in words[1:]]
                search = tuple(filter(None, given))[: 1 if words[0] == "domain" else _MAX_SEARCH]
            elif words[0] == "options":
                for option in words[1:]:
                    name, _, value = option.partition(":")
                    if name == "ndots" and value.isascii() and value.isdigit():
                        ndots = min(int(value[:9]), 15)
        return cls(tuple(dict.fromkeys(servers))[:MAX_NAME_SERVERS] or cls.servers, search, ndots)

    def candidates(self, name: str) -> list[str]:
        """Return the absolute names to look up for ``name``, in order, without a dot at the end."""
        if name.endswith("."):
            return [name[:-1]]
        searched = [f"{name}.{domain}" for domain in self.search]
        return [name, *searched] if name.count(".") >= self.ndots else [*searched, name]

"""/etc/hosts and /etc/resolv.conf, read again when they change."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from typing import Final, Generic, TypeVar

from ...core.address import IPAddress
from ...core.resolv_conf import ResolvConf
from ...core.text_file import read_host_file

__all__ = ["Hosts", "WatchedFile", "parse_hosts", "parse_resolv_conf", "watched_resolv_conf"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_BYTES: Final = 64 * 1024 * 1024
_MAX_CONF: Final = 1024 * 1024
"""Of resolv.conf, which is read on the event loop."""


class Hosts:
    """hosts(5): the addresses of names."""

    def __init__(self, names: dict[str, list[str]]) -> None:
        self._names = names

    def find(self, name: str) -> list[IPAddress]:
        """Return the addresses of a name in lower case, [] if it is not there."""
        found: list[IPAddress] = []
        for text in self._names.get(name.removesuffix("."), ()):
            try:
                found.append(ip_address(text))
            except ValueError:  # glibc skips such lines, too
                continue
        return list(dict.fromkeys(found))


def parse_hosts(text: str) -> Hosts:
    """Read a hosts file. Addresses are kept as text: of 100,000 lines few are ever asked for."""
    names: dict[str, list[str]] = {}
    for line in text.removeprefix("\ufeff").split("\n"):  # and not at all that Python takes for ends of lines
        address, *aliases = line.partition("#")[0].split() or ("",)
        for alias in aliases:
            names.setdefault(alias.lower().removesuffix("."), []).append(address)
    return Hosts(names)


def parse_resolv_conf(text: str) -> ResolvConf:
    """Read a resolv.conf; where it names no search list, the domain of this host's name is one (resolv.conf(5))."""
    found = ResolvConf.parse(text)
    domain = socket.gethostname().partition(".")[2].lower().strip(".")
    return replace(found, search=(domain,)) if domain and not found.search else found


def watched_resolv_conf(path: str) -> WatchedFile[ResolvConf]:
    """Return a resolv.conf to be watched: of more than 1 MiB the beginning counts."""
    return WatchedFile(path, parse_resolv_conf, _MAX_CONF)


class WatchedFile(Generic[T]):
    """A file and what it says; absent, it says what an empty one says."""

    def __init__(self, path: str, parse: Callable[[str], T], max_bytes: int = _MAX_BYTES) -> None:
        self.path = path
        self._parse = parse
        self._max_bytes = max_bytes
        self._seen = self._stamp()
        self.value = parse("")
        self.read()

    def changed(self) -> bool:
        """Whether the file is another one than at the last call (or at first)."""
        stamp = self._stamp()
        changed, self._seen = stamp != self._seen, stamp
        return changed

    def read(self) -> None:
        """Read it again, in whichever thread; one that cannot be read says what it said, and a line is logged."""
        try:
            self.value = self._parse(read_host_file(self.path, self._max_bytes))
        except OSError as error:
            log.error("%s stays as it was: %s", self.path, error)

    def _stamp(self) -> tuple[int, int, int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

"""Kinds of settings: what a TOML value must look like, what it becomes, and how it is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final, Generic, TypeVar

from ..core.address import Authority, Endpoint
from ..core.binding import BindingSet
from ..core.names import NameSet
from ..kernel.privileges import UserError, UserIds
from ..policy.rule import PolicyError, parse_network

__all__ = [
    "AUTHORITY",
    "BINDING",
    "BOOLEAN",
    "DURATION",
    "DURATION_OR_OFF",
    "ENDPOINT",
    "HOST_PATTERN",
    "LOOPBACK_ENDPOINT",
    "NETWORK",
    "PORT",
    "RATE",
    "SIZE",
    "TARGET",
    "TEXT",
    "USER",
    "Kind",
    "Rate",
    "any_path",
    "choice",
    "file_path",
    "integer",
    "ip_literal",
    "number",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Kind(Generic[T]):
    """``name`` says in a few words what is allowed. ``parse`` raises ValueError, without repeating the value."""

    name: str
    parse: Callable[[Any], T]
    show: Callable[[T], object] = lambda value: value
    is_path: bool = False
    is_secret: bool = False
    """A path of what nobody else may read."""
    hide: Callable[[str], str] | None = None
    """What of the value may be shown, where not all of it."""


def _need(value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    # bool is an int to Python, but true is no number to an operator
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise ValueError(f"write {wanted}")


def _boolean(value: object) -> bool:
    _need(value, bool, "true or false")
    return bool(value)


BOOLEAN: Final = Kind("true or false", _boolean)


def _text(value: object) -> str:
    _need(value, str, "a text in quotes")
    if not value:
        raise ValueError("it is empty")
    return str(value)


TEXT: Final = Kind("text", _text)


def integer(lowest: int, highest: int) -> Kind[int]:
    """A whole number from ``lowest`` to ``highest``."""
    wanted = f"a whole number from {lowest} to {highest}"

    def parse(value: Any) -> int:
        _need(value, int, wanted)
        if not lowest <= value <= highest:
            raise ValueError(f"write {wanted}")
        return int(value)

    return Kind(wanted, parse)


PORT: Final = integer(1, 65535)


def number(lowest: float, highest: float) -> Kind[float]:
    """A number from ``lowest`` to ``highest``."""
    wanted = f"a number from {lowest:g} to {highest:g}"

    def parse(value: Any) -> float:
        _need(value, (int, float), wanted)
        if not lowest <= value <= highest:
            raise ValueError(f"write {wanted}")
        return float(value)

    return Kind(wanted, parse)


def choice(*words: str) -> Kind[str]:
    """One of some words."""
    wanted = "one of " + ", ".join(f'"{word}"' for word in words)

    def parse(value: Any) -> str:
        if value not in words:
            raise ValueError(f"write {wanted}")
        return str(value)

    return Kind(wanted, parse)


_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_TEXT: Final = 'a time such as "500ms", "10s", "5m", "1h30m", "7d" (or a number of seconds)'


def _duration(value: Any) -> float:
    _need(value, (str, int, float), _DURATION_TEXT)
    if isinstance(value, str):
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd])", value)
        if not parts or "".join(amount + unit for amount, unit in parts) != value:
            raise ValueError(f"write {_DURATION_TEXT}")
        value = sum(float(amount) * _UNITS[unit] for amount, unit in parts)
    if not 0 < value <= 315_360_000:
        raise ValueError("write a time above 0 and of at most 10 years")
    return float(value)


def _show_duration(seconds: float) -> str:
    for unit in ("d", "h", "m", "s"):
        if seconds >= _UNITS[unit] and (seconds / _UNITS[unit]).is_integer():
            return f"{seconds / _UNITS[unit]:.0f}{unit}"
    return f"{seconds * 1000:g}ms"


DURATION: Final = Kind("time", _duration, _show_duration)


def _duration_or_off(value: Any) -> float | None:
    return None if value == "off" else _duration(value)


def _show_duration_or_off(seconds: float | None) -> str:
    return "off" if seconds is None else _show_duration(seconds)


DURATION_OR_OFF: Final = Kind('time or "off"', _duration_or_off, _show_duration_or_off)

_SIZES: Final = {"": 1, "B": 1, "kB": 1000, "KiB": 1024, "MB": 10**6, "MiB": 1 << 20, "GB": 10**9, "GiB": 1 << 30}
_SIZE_TEXT: Final = 'a size such as "64KiB", "1.5MB", "10MiB" (or a number of bytes)'


def _size(value: Any) -> int:
    _need(value, (str, int), _SIZE_TEXT)
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", value)
        if match is None or match.group(2) not in _SIZES:
            raise ValueError(f"write {_SIZE_TEXT}")
        value = round(float(match.group(1)) * _SIZES[match.group(2)])
    if not 0 < value <= 1 << 50:
        raise ValueError("write a size above 0")
    return int(value)


def _show_size(size: int) -> str | int:
    for unit in ("GiB", "MiB", "KiB"):
        if size % _SIZES[unit] == 0:
            return f"{size // _SIZES[unit]}{unit}"
    return size


SIZE: Final = Kind("size", _size, _show_size)


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a second."""

    per_second: float
    text: str


_RATE_TEXT: Final = 'a rate such as "10/s", "100/m", "1000/h" (or a number a second)'


def _rate(value: Any) -> Rate:
    _need(value, (str, int, float), _RATE_TEXT)
    per_second = value
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)/([smh])", value)
        if match is None:
            raise ValueError(f"write {_RATE_TEXT}")
        per_second = float(match.group(1)) / _UNITS[match.group(2)]
    if not 0.0001 <= per_second <= 1e9:
        raise ValueError("write a rate from 0.0001 to 1e9 a second")
    return Rate(float(per_second), value if isinstance(value, str) else f"{value:g}/s")


RATE: Final = Kind("rate", _rate, lambda rate: rate.text)


def _network(value: Any) -> IPv4Network | IPv6Network:
    try:
        return parse_network(_text(value))
    except PolicyError as error:
        raise ValueError(str(error)) from None


NETWORK: Final = Kind("CIDR", _network, str)


def _endpoint(value: Any) -> Endpoint:
    return Endpoint.of(_text(value))


ENDPOINT: Final = Kind("address and port", _endpoint, str)


def _binding(value: Any) -> BindingSet:
    return BindingSet.of(_text(value))


BINDING: Final = Kind("address or prefix, and ports", _binding, str)


def _loopback(value: Any) -> Endpoint:
    endpoint = _endpoint(value)
    if endpoint.address is None or not endpoint.address.ip.is_loopback:
        raise ValueError('metrics are served on loopback only: write for example "127.0.0.1:9464"')
    return endpoint


LOOPBACK_ENDPOINT: Final = Kind("loopback address and port", _loopback, str)


def _authority(value: Any) -> Authority:
    host, colon, port = _text(value).rpartition(":")
    if not colon or not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError('write host and port, for example "db.example:5432"')
    return Authority.of(host, int(port))


AUTHORITY: Final = Kind("host and port", _authority, str)


def _ip(version: int | None) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        ip = Authority.of(_text(value), 0).ip
        if ip is None or (version is not None and ip.version != version):
            raise ValueError(f"write an IP{'' if version is None else f'v{version}'} address")
        return str(ip)

    return parse


def ip_literal(version: int | None = None) -> Kind[str]:
    """An address of one family, or of either."""
    return Kind(f"IP{'' if version is None else f'v{version}'} address", _ip(version))


def _target(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text):
        raise ValueError('write module:attribute, for example "myproxy:app"')
    return text


TARGET: Final = Kind("module:attribute", _target)


def _user(value: Any) -> str:
    text = _text(value)
    try:
        UserIds.of(text)
    except UserError as error:
        raise ValueError(str(error)) from None
    return text


USER: Final = Kind("unprivileged user of this host", _user)


def _pattern(value: Any) -> str:
    text = _text(value)
    NameSet([text])  # raises ValueError with the forms
    return text


HOST_PATTERN: Final = Kind("host pattern", _pattern)


def any_path() -> Kind[str]:
    """The path of a file that need not be there; a relative one is seen from the configuration file's directory."""
    return Kind("path of a file", _text, is_path=True)


def file_path(*, secret: bool = False) -> Kind[str]:
    """The path of a file that exists; a relative one is seen from the configuration file's directory. What is in a
    ``secret`` one is for its owner alone."""

    def parse(value: Any) -> str:
        text = _text(value)
        if not os.access(text, os.R_OK):
            raise ValueError("there is no such file, or it cannot be read")
        return text

    return Kind("path of a file", parse, is_path=True, is_secret=secret)

"""What a caller may give, checked at run time: a wrong type is told with what to write."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from ..policy.rule import LONGEST_SECONDS, parse_ttl

__all__ = ["Source", "Sources", "Ttl", "path_text", "port_number", "reason_text", "source_texts", "ttl_text"]

Source = str | IPv4Address | IPv6Address | IPv4Network | IPv6Network
"""An address or a network, as text or of :mod:`ipaddress`."""
Sources = Source | Iterable[Source]
"""One, or many."""
Ttl = float | timedelta | str | None
"""How long: seconds, a timedelta, or text as commands take it (``"15m"``); None for good."""

_KINDS = (str, IPv4Address, IPv6Address, IPv4Network, IPv6Network)


def source_texts(sources: object) -> tuple[list[str], bool]:
    """Return sources as text, and whether it was one alone. Raises TypeError."""
    if isinstance(sources, _KINDS):
        return [str(sources)], True
    if isinstance(sources, bytes | bytearray) or not isinstance(sources, Iterable):
        raise _no_source(sources)
    texts = []
    for source in sources:
        if not isinstance(source, _KINDS):
            raise _no_source(source)
        texts.append(source if type(source) is str else str(source))
    return texts, False


def _no_source(found: object) -> TypeError:
    return TypeError(
        f"a source is an address or a network, as text or of ipaddress, not {type(found).__name__} ({found!r:.40}): "
        "write for example '192.0.2.7' or '2001:db8::/32', or a list of them"
    )


def ttl_text(ttl: object) -> str | None:
    """Return a time as commands have it, in whole seconds, rounded up. Raises TypeError or ValueError."""
    if ttl is None:
        return None
    if isinstance(ttl, str):
        return str(parse_ttl(ttl) // 1_000_000_000)
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"ttl is seconds, a timedelta, or text such as '15m', not {type(ttl).__name__}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"ttl {ttl}: use 1 second to 10 years, or None for good")
    return str(min(math.ceil(seconds), LONGEST_SECONDS))


def port_number(port: object) -> int | None:
    """Return a listener's port, None for any. Raises TypeError or ValueError."""
    if port is None:
        return None
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"port is a whole number, not {type(port).__name__}: write for example port=443")
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port}: use 1 to 65535")
    return port


def reason_text(reason: object) -> str:
    """Return a reason. Raises TypeError."""
    if not isinstance(reason, str):
        raise TypeError(f"reason is text, not {type(reason).__name__}")
    return reason


def path_text(path: object) -> str:
    """Return the absolute path of a file. Raises TypeError."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a policy file is named by its path, not by {type(path).__name__}")
    return os.path.abspath(os.fspath(path))

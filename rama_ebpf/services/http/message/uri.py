"""Request targets and authorities (RFC 9112 section 3.2, RFC 3986 section 3.2), read one way only.

What two readers could take for different hosts is refused: user information, percent-encoding or odd characters in a
host, empty labels, numbers that only ``inet_aton`` takes for an address (``127.1``, ``0x7f.1``, ``010.0.0.1``), zone
identifiers (RFC 9844: of no use but to the host that wrote them), zero-padded ports, fragments, backslashes.
"""

from __future__ import annotations

import functools
import re
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from ....core.address import Authority

__all__ = ["DEFAULT_PORTS", "Target", "TargetForm", "parse_authority", "parse_target"]

DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_AUTHORITY: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::([1-9][0-9]{0,4})?)?")
_LABEL: Final = re.compile(r"[0-9A-Za-z_]([0-9A-Za-z_-]{0,61}[0-9A-Za-z_])?")
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_TARGET: Final = re.compile(r"[!-~]+")
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_AUTHORITY_END: Final = re.compile(r"[/?\\]")
_PLAIN: Final = re.compile(r"(https?)://([0-9A-Za-z._:-]+)(/[!$&-\[\]-~]*)")
"""An absolute URI in which nothing has to be looked for: no escape, fragment or backslash, an authority to be read."""
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")


class TargetForm(Enum):
    """The four forms of a request target (RFC 9112 section 3.2)."""

    ORIGIN = "origin"
    ABSOLUTE = "absolute"
    AUTHORITY = "authority"
    ASTERISK = "asterisk"


class Target(NamedTuple):
    """A request target. ``authority`` is "" for origin and asterisk form, ``path`` (with the query) for CONNECT."""

    form: TargetForm
    scheme: str
    authority: str
    path: str


@functools.lru_cache(maxsize=1024)  # most clients ask the same few hosts again and again
def parse_authority(text: str, default_port: int | None = None) -> Authority:
    """Return the host and port that ``text`` (``host``, ``host:port``, ``[v6]:port``) names. An empty port, ``host:``,
    is none (RFC 3986 section 3.2.3).

    Raises ValueError if it is not exactly one host, or if it has no port and ``default_port`` is None.
    """
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise ValueError("bad authority")
    host, port_text = match.groups()
    port = int(port_text) if port_text is not None else default_port
    if port is None:
        raise ValueError("authority without a port")
    if port > 65535:
        raise ValueError("port above 65535")
    if host.startswith("["):
        return Authority(IPv6Address(host[1:-1]), port)
    return Authority(_parse_host(host), port)


def _parse_host(host: str) -> IPv4Address | str:
    name = host[:-1] if host.endswith(".") else host
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]) is not None:
        # A host that ends in a number is an address to some readers: it must be one to all of them.
        return IPv4Address(host)
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("bad host name")
    return host


def parse_target(method: str, target: str) -> Target:
    """Return the request target of a request with ``method``. Raises ValueError if it is not of a form that the
    method allows, or could be read in two ways."""
    plain = _PLAIN.fullmatch(target)
    if plain is not None and method != "CONNECT":  # most of what proxies are asked
        scheme, authority, path = plain.groups()
        parse_authority(authority, DEFAULT_PORTS[scheme])
        return Target(TargetForm.ABSOLUTE, scheme, authority.removesuffix(":"), path)
    if _TARGET.fullmatch(target) is None:
        raise ValueError("a control character, a blank or a non-ASCII octet in the target")
    if method == "CONNECT":
        parse_authority(target)
        return Target(TargetForm.AUTHORITY, "", target, "")
    if "#" in target:
        raise ValueError("a fragment in the target")
    if target == "*":
        if method != "OPTIONS":
            raise ValueError("the target * is for OPTIONS only")
        return Target(TargetForm.ASTERISK, "", "", "*")
    if target.startswith("/"):
        return Target(TargetForm.ORIGIN, "", "", _checked_path(target))
    return _parse_absolute(method, target)


def _parse_absolute(method: str, target: str) -> Target:
    scheme, separator, rest = target.partition("://")
    if not separator or _SCHEME.fullmatch(scheme) is None:
        raise ValueError("the target is neither a path nor an absolute URI")
    match = _AUTHORITY_END.search(rest)
    end = len(rest) if match is None else match.start()
    authority, path = rest[:end], rest[end:]
    scheme = scheme.lower()
    parse_authority(authority, DEFAULT_PORTS.get(scheme, 0))
    if not path:
        # RFC 9112 section 3.2.4: the last proxy turns OPTIONS without a path into the asterisk form.
        path = "*" if method == "OPTIONS" else "/"
    elif path.startswith("?"):
        path = "/" + path
    authority = authority.removesuffix(":")
    return Target(TargetForm.ABSOLUTE, scheme, authority, path if path == "*" else _checked_path(path))


def _checked_path(path: str) -> str:
    before_query = path.partition("?")[0]
    if "\\" in before_query:
        raise ValueError("a backslash in the path")
    if _BAD_ESCAPE.search(before_query) is not None:
        raise ValueError("a broken percent-encoding in the path")
    return path

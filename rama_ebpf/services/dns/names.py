"""Names as clients write them, in the form in which name servers know them."""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ...core.address import IPAddress
from .errors import ResolveError

__all__ = ["ascii_name", "known_addresses"]

_NUMBERS: Final = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+)){0,3}", re.IGNORECASE | re.ASCII)


def ascii_name(name: str) -> str:
    """Return ``name`` in ASCII and lower case: IDNA (RFC 3490), labels of 1-63 octets, at most 253 in all.

    A dot at the end stays. Raises :class:`ResolveError` for what is no domain name.
    """
    try:
        found = name.lower() if name.isascii() else name.encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise ResolveError(f"{name!r} is not a valid domain name: {error}") from error
    bare = found.removesuffix(".")
    if len(bare) > 253 or not all(0 < len(label) < 64 for label in bare.split(".")) or "\0" in bare:
        raise ResolveError(f"{name!r} is not a valid domain name: a label is empty or too long")
    return found


def known_addresses(name: str) -> list[IPAddress]:
    """Return what no name server is asked for: addresses in the forms of inet_aton(3) (``127.1``), and localhost
    with all names below it (RFC 6761 section 6.3)."""
    if _NUMBERS.fullmatch(name):
        try:
            return [IPv4Address(socket.inet_aton(name))]
        except OSError:
            return []
    bare = name.removesuffix(".")
    if bare == "localhost" or bare.endswith(".localhost"):
        return [IPv6Address("::1"), IPv4Address("127.0.0.1")]
    return []

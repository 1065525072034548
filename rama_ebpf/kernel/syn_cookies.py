"""Whether this network namespace sends SYN cookies: the host's sysctl says so, and it is never changed here.

Reference: ``Documentation/networking/ip-sysctl.rst`` (tcp_syncookies), RFC 4987.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["refusal", "setting"]

_SYSCTL: Final = Path("/proc/sys/net/ipv4/tcp_syncookies")


def setting() -> int | None:
    """Return ``net.ipv4.tcp_syncookies``: 0 never, 1 when a queue is full, 2 always; None if the kernel has none."""
    try:
        return int(_SYSCTL.read_text(encoding="ascii"))
    except FileNotFoundError:
        return None


def refusal() -> str:
    """Say why no SYN cookie is ever sent, by the stack or by XDP; empty if they are."""
    value = setting()
    if value is None:
        return "no SYN cookies are sent: this kernel has none (CONFIG_SYN_COOKIES)"
    if value == 0:
        return "no SYN cookies are sent: net.ipv4.tcp_syncookies is 0 (1: when a queue is full, 2: always)"
    return ""

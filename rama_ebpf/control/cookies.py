"""Whether the host lets XDP send the SYN cookies that it is to send: a sysctl says so, and may change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from ..kernel import syn_cookies

__all__ = ["CookieWatch"]

log = logging.getLogger("rama_ebpf")

_LOOK_SECONDS: Final = 5.0


class CookieWatch:
    """Watches ``net.ipv4.tcp_syncookies`` if cookies are ``wanted``, which no reload changes."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._refusal = syn_cookies.refusal() if wanted else ""
        if self._refusal:
            log.warning("%s", self._refusal)

    @property
    def state(self) -> dict[str, str | None] | None:
        """What ``status`` shows: None where no cookies are wanted, else why there are never any."""
        return {"why_never": self._refusal or None} if self._wanted else None

    async def watch(self, on_change: Callable[[], object]) -> None:
        """Say when the sysctl comes to forbid cookies, or to allow them, and call ``on_change``."""
        while self._wanted:
            await asyncio.sleep(_LOOK_SECONDS)
            if (refusal := syn_cookies.refusal()) != self._refusal:
                self._refusal = refusal
                log.warning("%s", refusal or "SYN cookies may be sent again")
                on_change()

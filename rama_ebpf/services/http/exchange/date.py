"""The Date field (RFC 9110 section 6.6.1)."""

from __future__ import annotations

import functools
import time
from email.utils import formatdate

__all__ = ["http_date"]


def http_date() -> str:
    """Return the time now as Date has it; made once a second."""
    return _formatted(int(time.time()))


@functools.lru_cache(4)
def _formatted(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)

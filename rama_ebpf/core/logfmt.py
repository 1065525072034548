"""Lines of ``key=value`` pairs, in which no peer can forge a field or a line."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from typing import Final

__all__ = ["logfmt", "quoted"]

_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")


def logfmt(pairs: Iterable[tuple[str, object]]) -> str:
    """Return the pairs whose value is neither empty nor None; a value with a blank, quote, equals sign, backslash or
    anything that is not printable ASCII is quoted as JSON does it."""
    return " ".join(f"{key}={quoted(str(value))}" for key, value in pairs if value not in ("", None))


@functools.lru_cache(256)
def quoted(text: str) -> str:
    """Return ``text`` as a value of logfmt."""
    return text if _PLAIN.fullmatch(text) is not None else json.dumps(text)

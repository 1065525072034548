"""What a layer has learned of a connection and its line in the access log is to show."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Note"]


@dataclass(frozen=True, slots=True)
class Note:
    """An extension: ``key`` is one word in lower case, ``value`` any text, also of the peer's choice."""

    key: str
    value: str

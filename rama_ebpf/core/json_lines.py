"""Log lines for machines: a JSON object each, in ASCII, so that no text of a peer's can break a line or forge one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Protocol, runtime_checkable

__all__ = ["HasFields", "JsonFormatter"]


@runtime_checkable
class HasFields(Protocol):
    """A record that is logged as an object (``access`` of :func:`~.log_lines.log_line`)."""

    def fields(self) -> Mapping[str, object]:
        """Return what it says, by name: numbers as numbers, and nothing that is not known."""


class JsonFormatter(logging.Formatter):
    """Writes ``time`` (UTC, RFC 3339), ``level``, ``logger`` and either ``message`` or, with ``event`` "access",
    the fields of a connection or request; ``traceback`` where there is one. ``fixed`` is in each line."""

    def __init__(self, fixed: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self._fixed = dict(fixed or {})

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line."""
        at = datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")
        row: dict[str, object] = {"time": at, "level": record.levelname.lower(), "logger": record.name, **self._fixed}
        access = getattr(record, "access", None)
        if isinstance(access, HasFields):
            row["event"] = "access"
            row.update((name, value) for name, value in access.fields().items() if name not in row)
        else:
            row["message"] = record.getMessage()
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, default=str)

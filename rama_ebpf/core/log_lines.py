"""Log lines that come once a request: the standard records and formats of :mod:`logging`, without what they cost.

A :class:`logging.LogRecord` finds out its caller, thread, process and task, and a formatter asks for the local time
anew for each line: more than a request costs. Here the record says what is the same each time, and the time's text is
made once a second.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Final, TextIO

__all__ = ["LineHandler", "SecondFormatter", "log_line"]

_BASE: Final = logging.makeLogRecord({"levelno": logging.INFO, "levelname": "INFO"}).__dict__


_TIME: Final = "\0time\0"
_MESSAGE: Final = "\0message\0"


class _Line(logging.LogRecord):
    """A record of a message that needs no arguments. ``access`` is the message as an object."""

    def __init__(self, name: str, message: object) -> None:
        now = time.time()
        self.__dict__ = {
            **_BASE,
            "name": name,
            "msg": message,
            "created": now,
            "msecs": int(now % 1 * 1000) + 0.0,
            "access": message,
        }

    def getMessage(self) -> str:  # the library's name
        return str(self.msg)


def log_line(log: logging.Logger, message: object) -> None:
    """Log ``str(message)`` at INFO; handlers find ``message`` itself as the record's ``access``."""
    if log.isEnabledFor(logging.INFO):
        log.handle(_Line(log.name, message))


class SecondFormatter(logging.Formatter):
    """A formatter of ``%(asctime)s`` as the standard one writes it (``2026-01-31 12:00:00,123``)."""

    def __init__(self, fmt: str) -> None:
        super().__init__(fmt)
        self._line = fmt
        self._second = -1
        self._text = ""
        self._around: dict[str, tuple[str, str, str] | None] = {}

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line; of :func:`log_line`, all but the time and the message is known by its logger."""
        if type(record) is not _Line:
            return super().format(record)
        name = record.name
        if name not in self._around:
            self._around[name] = self._cut(record)
        around = self._around[name]
        if around is None:
            return super().format(record)
        return f"{around[0]}{self.formatTime(record)}{around[1]}{record.msg}{around[2]}"

    def _cut(self, record: logging.LogRecord) -> tuple[str, str, str] | None:
        """Return what a line has before its time, between time and message, and behind; None for another order."""
        fields = {**record.__dict__, "asctime": _TIME, "message": _MESSAGE}
        try:
            before, rest = (self._line % fields).split(_TIME)
            between, after = rest.split(_MESSAGE)
        except ValueError:
            return None
        varying = ("created", "msecs", "relativeCreated")
        return None if any(f"({name})" in self._line for name in varying) else (before, between, after)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Return the local time of a record."""
        if datefmt is not None:
            return super().formatTime(record, datefmt)
        second = int(record.created)
        if second != self._second:
            self._text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._second = second
        return f"{self._text},{int(record.msecs):03d}"


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes each record as a line, in one system call."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            stream = self.stream
            stream.write(self.format(record) + "\n")
            if not getattr(stream, "line_buffering", False):
                stream.flush()
        except Exception:  # noqa: BLE001  # as the standard handlers do: a log that fails ends nobody's work
            self.handleError(record)


def _forked() -> None:
    _BASE["process"] = os.getpid()


os.register_at_fork(after_in_child=_forked)

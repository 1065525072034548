"""Log lines that come once a request: the standard records and formats of :mod:`logging`, without what they cost.

A :class:`logging.LogRecord` finds out its caller, thread, process and task, and a formatter asks for the local time
anew for each line: more than a request costs. Here the record says what is the same each time, and the time's text is
made once a second.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import time
from collections.abc import Callable
from typing import Final, TextIO

__all__ = ["LineHandler", "SecondFormatter", "log_line"]

log = logging.getLogger(__name__)

_BASE: Final = logging.makeLogRecord({"levelno": logging.INFO, "levelname": "INFO"}).__dict__


_TOGETHER: Final = select.PIPE_BUF
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
    """Log ``str(message)`` at INFO; handlers find ``message`` itself as the record's ``access``. Where a
    :class:`LineHandler` is the only handler, and nothing filters, no record is made."""
    if log.isEnabledFor(logging.INFO):
        handler = _only_handler(log)
        if handler is None or not handler.take(log.name, message):
            log.handle(_Line(log.name, message))


def _only_handler(log: logging.Logger) -> LineHandler | None:
    found: LineHandler | None = None
    if log.filters:
        return None
    node: logging.Logger | None = log
    while node is not None:
        for handler in node.handlers:
            if found is not None or type(handler) is not LineHandler or handler.filters or handler.level > logging.INFO:
                return None
            found = handler
        node = node.parent if node.propagate else None
    return found


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
        around = self._known(record.name, record)
        if around is None:
            return super().format(record)
        return f"{around[0]}{self.formatTime(record)}{around[1]}{record.msg}{around[2]}"

    def line(self, name: str, message: object) -> str | None:
        """Return a message of :func:`log_line` as a line, as of now; None for a format that needs a record."""
        around = self._known(name, None)
        if around is None:
            return None
        now = time.time()
        second = int(now)
        if second != self._second:
            self._new_second(second)
        return f"{around[0]}{self._text},{int((now - second) * 1000):03d}{around[1]}{message}{around[2]}"

    def _known(self, name: str, record: logging.LogRecord | None) -> tuple[str, str, str] | None:
        if name not in self._around:
            self._around[name] = self._cut(_Line(name, "") if record is None else record)
        return self._around[name]

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
            self._new_second(second)
        return f"{self._text},{int(record.msecs):03d}"

    def _new_second(self, second: int) -> None:
        self._text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        self._second = second


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes records as lines, whole ones in each system call. Those of :func:`log_line` wait for the end of the event
    loop's turn, where there is a loop, and go together then, up to what a pipe takes as one (PIPE_BUF); no line
    overtakes another."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._waiting: list[str] = []
        self._size = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or let it wait."""
        try:
            line = self.format(record)
            if type(record) is _Line:
                self._add(line)
            else:
                self._waiting.append(line)
                self._write_waiting()
        except Exception:  # noqa: BLE001  # as the standard handlers do: a log that fails ends nobody's work
            self.handleError(record)

    def take(self, name: str, message: object) -> bool:
        """Take a message of :func:`log_line` for a logger; return false if it takes a record."""
        formatter = self.formatter
        if type(formatter) is not SecondFormatter:
            return False
        self.acquire()
        try:
            line = formatter.line(name, message)
            if line is None:
                return False
            self._add(line)
        except Exception:  # noqa: BLE001  # as in emit()
            self.handleError(_Line(name, message))
        finally:
            self.release()
        return True

    def _add(self, line: str) -> None:
        size = len(line) + 1
        if self._size + size > _TOGETHER:
            self._write_waiting()
        scheduled = bool(self._waiting) or _before_long(self.flush)
        self._waiting.append(line)
        self._size += size
        if not scheduled:
            self._write_waiting()

    def flush(self) -> None:
        """Write what waits."""
        self.acquire()
        try:
            self._write_waiting()
        except ValueError:
            pass  # the stream is closed: nobody will read it
        except OSError as error:
            log.debug("the log cannot be written: %s", error)
        finally:
            self.release()

    def _write_waiting(self) -> None:
        waiting = self._waiting
        if not waiting:
            return
        lines = "\n".join(waiting) + "\n"
        waiting.clear()
        self._size = 0
        self.stream.write(lines)
        if not getattr(self.stream, "line_buffering", False):
            self.stream.flush()


def _before_long(call: Callable[[], None]) -> bool:
    """Have something called at the end of the loop's turn; false where no loop runs."""
    try:
        asyncio.get_running_loop().call_soon(call)
    except RuntimeError:
        return False
    return True


def _forked() -> None:
    _BASE["process"] = os.getpid()


os.register_at_fork(after_in_child=_forked)

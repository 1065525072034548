"""Lines that come once a request look as the standard library would have written them."""

from __future__ import annotations

import asyncio
import io
import logging
import os
from collections.abc import Iterator

import pytest

from rama_ebpf.core.log_lines import LineHandler, SecondFormatter, log_line

FORMATS = (
    "%(asctime)s %(levelname)s worker 3 %(name)s: %(message)s",
    "%(message)s at %(asctime)s",
    "%(asctime)s.%(msecs)03d %(process)d %(message)s",
    "%(levelname)s %(message)s",
)


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    found = logging.getLogger("rama_ebpf.test")
    found.setLevel(logging.INFO)
    found.propagate = False
    yield found
    found.handlers.clear()


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Message:
    def __str__(self) -> str:
        return "100% of a=1 %s"


@pytest.mark.parametrize("text", FORMATS)
def test_a_line_is_written_as_the_standard_formatter_writes_it(log: logging.Logger, text: str) -> None:
    kept = Kept()
    log.addHandler(kept)
    message = Message()
    log_line(log, message)
    log_line(log, message)
    log.info("usual %s", "record")
    ours, theirs = SecondFormatter(text), logging.Formatter(text)
    for record in kept.records:
        assert ours.format(record) == theirs.format(record)
    assert kept.records[0].access is message
    assert kept.records[0].process == os.getpid()
    assert kept.records[0].getMessage() == "100% of a=1 %s"


def test_a_line_is_whole_in_the_stream_and_none_below_the_level(log: logging.Logger) -> None:
    stream = io.StringIO()
    handler = LineHandler(stream)
    handler.setFormatter(SecondFormatter("%(levelname)s %(name)s %(message)s"))
    log.addHandler(handler)
    log_line(log, "one")
    log.setLevel(logging.WARNING)
    log_line(log, "two")
    log.warning("three")
    assert stream.getvalue() == "INFO rama_ebpf.test one\nWARNING rama_ebpf.test three\n"


def test_a_message_that_cannot_be_written_ends_nobodys_work(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def __str__(self) -> str:
            raise ValueError("no text")

    handler = LineHandler(io.StringIO())
    handler.setFormatter(SecondFormatter("%(asctime)s %(message)s"))
    handler.handle(logging.makeLogRecord({"msg": Broken()}))
    assert "no text" in capsys.readouterr().err


async def test_lines_of_one_turn_are_written_together_and_in_order(log: logging.Logger) -> None:
    written: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    handler = LineHandler(Stream())
    handler.setFormatter(SecondFormatter("%(levelname)s %(message)s"))
    log.propagate = False
    log.handlers = [handler]
    log_line(log, "one")
    log_line(log, "two")
    assert written == []
    log.warning("three")  # whoever else logs overtakes nobody
    assert written == ["INFO one\nINFO two\nWARNING three\n"]
    log_line(log, "x" * 3000)
    log_line(log, "y" * 3000)  # more than a pipe takes as one
    assert written[1:] == ["INFO " + "x" * 3000 + "\n"]
    await asyncio.sleep(0)
    assert written[2:] == ["INFO " + "y" * 3000 + "\n"]


def test_a_line_without_a_record_is_the_line_of_the_record(log: logging.Logger) -> None:
    text = "%(asctime)s %(levelname)s worker 0 %(name)s: %(message)s"
    alone, beside = io.StringIO(), io.StringIO()
    log.propagate = False
    for stream, others in ((alone, []), (beside, [logging.NullHandler()])):
        handler = LineHandler(stream)
        handler.setFormatter(SecondFormatter(text))
        log.handlers = [handler, *others]
        log_line(log, "a=1 %s")
    lines = [stream.getvalue() for stream in (alone, beside)]
    assert len({line[:10] + line[23:] for line in lines}) == 1  # but for the time of day
    assert all(len(line) == len(lines[0]) for line in lines)

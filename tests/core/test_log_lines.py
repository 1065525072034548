"""Lines that come once a request look as the standard library would have written them."""

from __future__ import annotations

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

"""A second reading of HTTP/1.1, as careless as parsers in the field are, to compare a message's meaning with.

Each :class:`Habit` is a way in which real parsers differ. A message that all habits read alike cannot smuggle; this
module is written apart from the code under test and from h11.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["HABITS", "Habit", "Message", "Unreadable", "read_all"]


class Unreadable(Exception):
    """This reader makes nothing of the bytes."""


@dataclass(frozen=True)
class Habit:
    """What a parser takes for granted."""

    bare_lf: bool = False
    length_wins: bool = False
    last_length: bool = False
    underscores: bool = False
    blank_before_colon: bool = False
    folds: bool = False
    loose_coding: bool = False
    loose_chunk_size: bool = False
    controls_are_blanks: bool = False


HABITS = (
    Habit(),
    Habit(bare_lf=True),
    Habit(length_wins=True),
    Habit(last_length=True),
    Habit(underscores=True),
    Habit(blank_before_colon=True),
    Habit(folds=True),
    Habit(loose_coding=True),
    Habit(loose_chunk_size=True),
    Habit(controls_are_blanks=True),
    Habit(True, True, True, True, True, True, True, True, True),
)


@dataclass(frozen=True)
class Message:
    """What a reader takes for one message."""

    start: bytes
    hosts: tuple[bytes, ...]
    body: bytes
    trailers: int


def read_all(data: bytes, habit: Habit, *, bodiless: bool = False) -> list[Message]:
    """Read messages until the bytes are used up. ``bodiless``: the first one has no body, whatever it says."""
    messages: list[Message] = []
    while data:
        message, data = _read(data, habit, bodiless=bodiless and not messages)
        messages.append(message)
    return messages


def _read(data: bytes, habit: Habit, *, bodiless: bool) -> tuple[Message, bytes]:
    lines, rest = _lines(data, habit)
    if not lines:
        raise Unreadable("no start line")
    start, fields = lines[0], _fields(lines[1:], habit)
    lengths = [value for name, value in fields if name == b"content-length"]
    codings = [value.lower() for name, value in fields if name == b"transfer-encoding"]
    hosts = tuple(value for name, value in fields if name == b"host")
    chunked = any((b"chunked" in value) if habit.loose_coding else (value == b"chunked") for value in codings)
    if bodiless:
        return Message(start, hosts, b"", 0), rest
    if chunked and not (habit.length_wins and lengths):
        body, trailers, rest = _chunks(rest, habit)
        return Message(start, hosts, body, trailers), rest
    length = 0
    if lengths:
        text = lengths[-1 if habit.last_length else 0]
        if not text.isdigit():
            raise Unreadable("length")
        length = int(text)
    if len(rest) < length:
        raise Unreadable("the body is cut off")
    return Message(start, hosts, rest[:length], 0), rest[length:]


def _lines(data: bytes, habit: Habit) -> tuple[list[bytes], bytes]:
    lines: list[bytes] = []
    while True:
        end = data.find(b"\n")
        if end < 0:
            raise Unreadable("no end of the header section")
        line, data = data[:end], data[end + 1 :]
        if line.endswith(b"\r"):
            line = line[:-1]
        elif not habit.bare_lf:
            raise Unreadable("bare LF")
        if not line:
            return lines, data
        if line[:1] in (b" ", b"\t") and habit.folds and lines:
            lines[-1] += b" " + line.strip()
        else:
            lines.append(line)


def _fields(lines: list[bytes], habit: Habit) -> list[tuple[bytes, bytes]]:
    fields: list[tuple[bytes, bytes]] = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            continue  # as some do, skip what is no field
        if habit.blank_before_colon:
            name = name.rstrip(b" \t")
        if habit.underscores:
            name = name.replace(b"_", b"-")
        value = re.sub(rb"[\x00-\x20\x7f]+", b" ", value) if habit.controls_are_blanks else value
        fields.append((name.lower(), value.strip(b" \t")))
    return fields


def _chunks(data: bytes, habit: Habit) -> tuple[bytes, int, bytes]:
    body = b""
    while True:
        end = data.find(b"\n" if habit.bare_lf else b"\r\n")
        if end < 0:
            raise Unreadable("no chunk size")
        line, data = data[:end], data[end + (1 if habit.bare_lf else 2) :]
        text = line.partition(b";")[0].strip() if habit.loose_chunk_size else line
        try:
            size = int(text, 16)
        except ValueError:
            raise Unreadable("chunk size") from None
        if size < 0:
            raise Unreadable("chunk size")
        if size == 0:
            trailers, data = _lines(data, habit)
            return body, len(trailers), data
        if data[size : size + 2] != b"\r\n":
            raise Unreadable("chunk end")
        body, data = body + data[:size], data[size + 2 :]

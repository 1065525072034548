"""What a worker and the process that holds the wire relay say to each other, over a SOCK_SEQPACKET socket pair.

A worker makes the pair and sends one end of it through the *door*, a socket that all workers share and of which only
the other process reads. It parses bytes from the network, and so may have been taken over: what it says is fixed in
size, and believed only as far as its own tunnels go. Descriptors come along by SCM_RIGHTS (unix(7)).
"""

from __future__ import annotations

import enum
import socket
import struct
from dataclasses import dataclass
from typing import Final

from .report import CloseReason
from .wire_story import STORY_BYTES

__all__ = ["MESSAGE_BYTES", "Answer", "Ask", "Reply", "Request", "receive", "send"]

MESSAGE_BYTES: Final = 2048
_REQUEST: Final = struct.Struct("=BIIIQ")
_REPLY: Final = struct.Struct("=BIIQQ")
_REASONS: Final = tuple(CloseReason)


class Ask(enum.IntEnum):
    """What a worker wants."""

    TAKE = 1
    """Take a tunnel over; with the sockets of client and target."""
    GIVE_UP = 2
    """If it is not taken over by now, leave it to me."""
    CUT = 3
    ADOPT = 4
    """I go on with tunnels that have outlived their workers."""
    LET_GO = 5
    """I do no more: mine that outlive me are nobody's now. ``number`` says nothing."""


class Answer(enum.IntEnum):
    """What a worker is told."""

    WELCOME = 1
    """With the pairs, to be read."""
    WATCHED = 2
    """Say what you have to say to both ends, and wait. ``value`` is the number of the pair."""
    REFUSED = 3
    TAKEN = 4
    """Close your sockets."""
    SPOILED = 5
    """It is yours for good."""
    ENDED = 6
    ORPHAN = 7
    """A tunnel that has outlived its worker is yours: ``value`` is the number of the pair, ``text`` its story."""


@dataclass(frozen=True, slots=True)
class Request:
    """``number`` is what the worker calls the tunnel; ``owed`` are the bytes that it has to say to client and target;
    ``deadline`` is in ns of CLOCK_MONOTONIC: later nothing begins. With a ``story`` (:mod:`.wire_story`) the tunnel is
    to outlive the worker."""

    ask: Ask
    number: int
    owed: tuple[int, int] = (0, 0)
    deadline: int = 0
    story: bytes = b""

    def pack(self) -> bytes:
        return _REQUEST.pack(self.ask, self.number, *self.owed, self.deadline) + self.story

    @classmethod
    def unpack(cls, data: bytes) -> Request:
        """Raises ValueError."""
        if not _REQUEST.size <= len(data) <= _REQUEST.size + STORY_BYTES:
            raise ValueError(f"a request of {len(data)} bytes")
        ask, number, to_client, to_target, deadline = _REQUEST.unpack_from(data)
        if len(data) > _REQUEST.size and ask != Ask.TAKE:
            raise ValueError(f"a story with request {ask}")
        return cls(Ask(ask), number, (to_client, to_target), deadline, data[_REQUEST.size :])


@dataclass(frozen=True, slots=True)
class Reply:
    """``moved`` are the bytes to upstream and client of a tunnel that has ended, ``text`` why one was refused."""

    answer: Answer
    number: int = 0
    value: int = 0
    moved: tuple[int, int] = (0, 0)
    text: str = ""

    def pack(self) -> bytes:
        head = _REPLY.pack(self.answer, self.number, self.value, *self.moved)
        return head + self.text.encode()[: MESSAGE_BYTES - _REPLY.size]

    @classmethod
    def unpack(cls, data: bytes) -> Reply:
        """Raises ValueError."""
        if len(data) < _REPLY.size:
            raise ValueError(f"a reply of {len(data)} bytes")
        answer, number, value, up, down = _REPLY.unpack_from(data)
        return cls(Answer(answer), number, value, (up, down), data[_REPLY.size :].decode(errors="replace"))

    @property
    def reason(self) -> CloseReason:
        """Why the tunnel has ended."""
        return _REASONS[self.value]

    @classmethod
    def ended(cls, number: int, reason: CloseReason, moved: tuple[int, int]) -> Reply:
        return cls(Answer.ENDED, number, _REASONS.index(reason), moved)


def send(sock: socket.socket, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
    """Send one message. Raises BlockingIOError where the other end does not read, or another OSError."""
    socket.send_fds(sock, [data], list(descriptors), socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, descriptors: int) -> tuple[bytes, list[int]]:
    """Receive one message with at most so many descriptors, which are the caller's; b"" at the end. Raises OSError."""
    data, fds, _, _ = socket.recv_fds(sock, MESSAGE_BYTES, descriptors, socket.MSG_CMSG_CLOEXEC)
    return data, fds

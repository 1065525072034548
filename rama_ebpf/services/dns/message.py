"""DNS messages, as far as a resolver of addresses needs them (RFC 1035, RFC 2308, RFC 6891).

What a server says is read in one pass, without an object for each record: an answer of 16 KiB, which anybody may have
whose own zone a client asks for, holds the event loop for about 2 ms, and the usual one for a hundredth of that.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ...core.address import IPAddress

__all__ = [
    "FORMERR",
    "NOERROR",
    "NOTIMP",
    "NXDOMAIN",
    "ContradictoryAnswer",
    "Family",
    "MalformedMessage",
    "Query",
    "Reply",
    "code_name",
]

Family = type[IPv4Address] | type[IPv6Address]

NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
_CODE_NAMES: Final = {
    NOERROR: "NOERROR",
    FORMERR: "FORMERR",
    SERVFAIL: "SERVFAIL",
    NXDOMAIN: "NXDOMAIN",
    NOTIMP: "NOTIMP",
    REFUSED: "REFUSED",
}
_A, _CNAME, _SOA, _AAAA, _OPT = 1, 5, 6, 28, 41
_IN: Final = 1
_RESPONSE, _OPCODE, _TRUNCATED, _RECURSION_DESIRED, _CODE = 0x8000, 0x7800, 0x0200, 0x0100, 0x000F
_HEADER: Final = struct.Struct(">6H")
_QUESTION: Final = struct.Struct(">2H")
_RECORD: Final = struct.Struct(">2HIH")
_SOA_TIMES: Final = struct.Struct(">5I")
_LONGEST_NAME: Final = 255
_MOST_POINTERS: Final = 16
_MOST_ALIASES: Final = 16
_MOST_ADDRESSES: Final = 64
_LARGEST_TTL: Final = (1 << 31) - 1


class MalformedMessage(ValueError):
    """It is no DNS message; the text says why in a word."""


class ContradictoryAnswer(MalformedMessage):
    """It is an answer that can be read, and makes no sense."""


@dataclass(frozen=True, slots=True)
class Query:
    """One question: the addresses of ``name`` (ASCII, absolute, without the dot at its end; labels of at most 63
    octets, 253 in all) of a family. With ``payload`` it says how many octets a datagram may have (EDNS)."""

    name: str
    family: Family
    payload: int | None
    identity: int

    @classmethod
    def make(cls, name: str, family: Family, payload: int | None) -> Query:
        """Make one with an identity that nobody can guess (RFC 5452)."""
        return cls(name, family, payload, secrets.randbits(16))

    def pack(self) -> bytes:
        """Return it as it is sent."""
        head = _HEADER.pack(self.identity, _RECURSION_DESIRED, 1, 0, 0, self.payload is not None)
        question = self._wire_name() + _QUESTION.pack(self._kind, _IN)
        options = b"" if self.payload is None else b"\0" + _RECORD.pack(_OPT, self.payload, 0, 0)
        return head + question + options

    def read(self, data: bytes) -> Reply | None:
        """Read what came in answer to it; None if it is none: somebody else may have sent it.

        Raises :class:`MalformedMessage` for an answer that makes no sense.
        """
        try:
            identity, flags, questions, answers, authorities, more = _HEADER.unpack_from(data)
            if identity != self.identity or not flags & _RESPONSE or flags & _OPCODE:
                return None
            message = _Message(data)
            if questions == 1:
                name, at = message.name(_HEADER.size)
                if (name, *_QUESTION.unpack_from(data, at)) != (self._wire_name().lower(), self._kind, _IN):
                    return None
            elif questions or flags & _CODE in (NOERROR, NXDOMAIN):
                return None  # only an error may leave the question out
            else:
                name, at = b"\0", _HEADER.size - _QUESTION.size
            if flags & _TRUNCATED:
                return Reply(flags & _CODE, True)
            return self._reply(message, name, at + _QUESTION.size, flags & _CODE, (answers, authorities, more))
        except (IndexError, struct.error) as error:
            raise MalformedMessage("Truncated") from error

    def _reply(self, message: _Message, name: bytes, at: int, code: int, counts: tuple[int, int, int]) -> Reply:
        addresses: dict[bytes, dict[bytes, int]] = {}
        aliases: dict[bytes, tuple[bytes, int]] = {}
        size = 4 if self._kind == _A else 16
        for record in message.records(at, counts[0], named=True):
            at = record.end
            if record.group != _IN:
                continue
            if record.kind == self._kind and record.size == size:
                addresses.setdefault(record.owner, {})[message.data[at - size : at]] = record.ttl
            elif record.kind == _CNAME:
                aliases[record.owner] = message.name(at - record.size)[0], record.ttl
        negative_ttl = _LARGEST_TTL
        for record in message.records(at, counts[1], named=not addresses):
            at = record.end
            if record.kind == _SOA and not addresses and record.size >= _SOA_TIMES.size:
                negative_ttl = min(record.ttl, _SOA_TIMES.unpack_from(message.data, at - _SOA_TIMES.size)[4])
        for record in message.records(at, counts[2], named=False):
            if record.kind == _OPT:
                code |= record.ttl >> 24 << 4  # RFC 6891 section 6.1.3
        if code not in (NOERROR, NXDOMAIN):
            return Reply(code)
        ttl = _LARGEST_TTL
        for _ in range(_MOST_ALIASES + 1):
            if found := addresses.get(name):
                if code == NXDOMAIN:
                    raise ContradictoryAnswer("AnswerForNXDOMAIN")
                ttl = min(ttl, *found.values())
                return Reply(code, False, tuple(map(self.family, [*found][:_MOST_ADDRESSES])), ttl)
            if name not in aliases:
                return Reply(code, False, (), min(ttl, negative_ttl))
            name, own = aliases[name]
            ttl = min(ttl, own)
        raise ContradictoryAnswer("ChainTooLong")

    @property
    def _kind(self) -> int:
        return _A if self.family is IPv4Address else _AAAA

    def _wire_name(self) -> bytes:
        labels = [label.encode("ascii") for label in self.name.split(".")]
        return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server says: a ``code`` (RFC 6895), and the addresses of one family, at most 64, good for ``ttl`` seconds;
    none if the name has none. If it is ``truncated`` it has to be asked for over TCP."""

    code: int
    truncated: bool = False
    addresses: tuple[IPAddress, ...] = ()
    ttl: int = 0


def code_name(code: int) -> str:
    """Return what RFC 6895 calls a response code."""
    return _CODE_NAMES.get(code, f"RCODE{code}")


@dataclass(slots=True)
class _Record:
    owner: bytes = b""
    kind: int = 0
    group: int = 0
    ttl: int = 0
    size: int = 0
    end: int = 0


class _Message:
    """Reads names and records. Raises IndexError or :class:`struct.error` at the end of the data."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._names: dict[int, bytes] = {}

    def name(self, at: int) -> tuple[bytes, int]:
        """Return the name at an offset, in lower case and without pointers, and the offset behind it."""
        data, begin, end, limit = self.data, at, 0, at
        labels: list[bytes] = []
        jumps: list[tuple[int, int]] = []
        left = _LONGEST_NAME
        while length := data[at]:
            if length < 64:
                label = data[at : at + 1 + length]
                at += 1 + length
                left -= 1 + length
                labels.append(label)
            elif length >= 192:
                target = (length & 63) << 8 | data[at + 1]
                end = end or at + 2
                if target >= limit or len(jumps) >= _MOST_POINTERS:
                    raise MalformedMessage("BadPointer")  # it leads forward, or round in circles
                if (known := self._names.get(target)) is not None:
                    labels.append(known)
                    left -= len(known) - 1
                    break
                at = limit = target
                jumps.append((target, len(labels)))
            else:
                raise MalformedMessage("BadLabelType")
            if left < 1:
                raise MalformedMessage("NameTooLong")
        else:
            labels.append(b"\0")
        if left < 1:
            raise MalformedMessage("NameTooLong")
        for target, above in jumps:  # or each record might have the same long way
            self._names[target] = b"".join(labels[above:]).lower()
        found = self._names[begin] = b"".join(labels).lower()  # lengths are below those of letters
        return found, end or at + 1

    def records(self, at: int, count: int, *, named: bool) -> Iterator[_Record]:
        """Yield the records of a section, each in the same object, with their owners if they are to be ``named``."""
        data, found = self.data, _Record()
        for _ in range(count):
            if named:
                found.owner, at = self.name(at)
            else:
                while 0 < (length := data[at]) < 64:
                    at += 1 + length
                at += 2 if length else 1
            found.kind, found.group, found.ttl, found.size = _RECORD.unpack_from(data, at)
            at += _RECORD.size + found.size
            if at > len(data):
                raise IndexError
            if found.ttl > _LARGEST_TTL and found.kind != _OPT:
                found.ttl = 0  # RFC 2181 section 8
            found.end = at
            yield found

"""The witness: the kernel's own word on what it would decide for a connection attempt.

A program of the gate's unit, over the gate's maps, that is attached nowhere (``bpf/witness.c``). It lives as long as
the server; a command opens it by its id and needs no compiler. One system call (BPF_PROG_TEST_RUN) answers up to 64
questions; nothing is counted or charged for them. See ``Documentation/bpf/bpf_prog_run.rst``.

Rejected: to pin it beside the maps. It would outlive a server that was killed, and speak for nobody.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ..core.address import IPAddress, SocketAddress, mapped
from . import abi, bpf
from .bytecode import Program

__all__ = ["WITNESS_PROGRAM", "Answer", "Question", "SourceQuestion", "Witness"]

_SCHED_CLS: Final = 3  # enum bpf_prog_type: its test runs take any bytes as a packet
WITNESS_PROGRAM: Final = Program("witness", _SCHED_CLS)
_BATCH: Final = abi.constants()["MAX_QUESTIONS"]
_TRIES: Final = 16
_NO_TARGET: Final = bytes(16)
_LISTENER: Final = {
    abi.constants()["TESTIMONY_NO_LISTENER"]: None,
    abi.constants()["TESTIMONY_OPEN"]: True,
    abi.constants()["TESTIMONY_CLOSED"]: False,
}


@dataclass(frozen=True, slots=True)
class Question:
    """A SYN from ``source`` to ``target``, which is what a listener listens at: a wildcard names itself."""

    source: IPAddress
    target: SocketAddress

    def pack(self, nonce: int) -> bytes:
        return abi.QUESTION.pack(mapped(self.source), mapped(self.target.ip), self.target.port, 0, nonce, 0)


@dataclass(frozen=True, slots=True)
class SourceQuestion:
    """A SYN from a source, in the 16 bytes of its IPv4-mapped form, to a port, whoever listens there."""

    source: bytes
    port: int

    def pack(self, nonce: int) -> bytes:
        return abi.QUESTION.pack(self.source, _NO_TARGET, self.port, 0, nonce, 0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What would be decided: numbers of ``enum action`` and ``enum stage``, and ids of rules (0: none).

    ``open`` is None for a target that is not under the gate, False for one that lets nobody in. ``loaded`` and
    ``runtime`` are (rank, rule) of what each layer says, (0, 0) where it says nothing or was not asked, because a
    failsafe or a ban came first. Rates are answered as within their limit.
    """

    open: bool | None
    action: int
    stage: int
    rule: int
    dry_action: int
    dry_rule: int
    loaded: tuple[int, int]
    runtime: tuple[int, int]

    @property
    def rank(self) -> int:
        """The rank of the rule that was found, of whichever layer."""
        return max(self.loaded[0], self.runtime[0])


class Witness:
    """Asks the program behind a descriptor, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def identity(self) -> int:
        """The program's id, for :meth:`of_server`."""
        return bpf.prog_info(self._fd).id

    @classmethod
    @contextlib.contextmanager
    def of_server(cls, identity: int, map_id: int) -> Iterator[Witness]:
        """Open the one of a running server by the program's id, which the server tells; ``map_id`` is that of a map
        which it must speak for. Raises OSError, if that server has ended (ENOENT) or uses other maps (ESTALE)."""
        fd = bpf.prog_by_id(identity)
        try:
            if map_id not in bpf.prog_map_ids(fd):
                raise OSError(errno.ESTALE, "the server's programs use other maps")
            yield cls(fd)
        finally:
            os.close(fd)

    def ask(self, questions: Iterable[Question | SourceQuestion]) -> list[Answer]:
        """Return an answer to each question, in order. Raises OSError."""
        asked = list(questions)
        batches = (asked[at : at + _BATCH] for at in range(0, len(asked), _BATCH))
        return list(itertools.chain.from_iterable(map(self._batch, batches)))

    def _batch(self, questions: Sequence[Question | SourceQuestion]) -> list[Answer]:
        for _ in range(_TRIES):
            nonce = random.getrandbits(32)
            packet = bytes(abi.TESTIMONY_HEAD.size) + b"".join(question.pack(nonce) for question in questions)
            try:
                _, _, out, _ = bpf.prog_test_run(self._fd, packet, repeat=len(questions), output=len(packet))
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL:  # so is a signal that has come between two runs
                    continue
                raise
            (answered,) = abi.TESTIMONY_HEAD.unpack_from(out)
            rows = list(abi.TESTIMONY.iter_unpack(out[abi.TESTIMONY_HEAD.size :]))
            if answered == len(questions) and all(row[0] == nonce for row in rows):
                return [_answer(row) for row in rows]
        raise OSError(errno.EAGAIN, "the witness in the kernel gives no answer")


def _answer(row: tuple[int, ...]) -> Answer:
    _, listener, action, stage, rule, dry_action, dry_rule, *found = row
    loaded, runtime = (found[0], found[1]), (found[2], found[3])
    return Answer(_LISTENER[listener], action, stage, rule, dry_action, dry_rule, loaded, runtime)

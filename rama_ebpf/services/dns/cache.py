"""Answers that are still good."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from .exchange import Answer, Family

__all__ = ["AnswerCache"]


class AnswerCache:
    """The latest ``size`` answers (0: none), each for its TTL; one of an IPv4 and one of an IPv6 question a name."""

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._clock = clock
        self._answers: OrderedDict[tuple[str, Family], tuple[float, Answer]] = OrderedDict()

    def get(self, name: str, family: Family) -> Answer | None:
        """Return the answer if it is still good."""
        found = self._answers.get((name, family))
        if found is None:
            return None
        if found[0] <= self._clock():
            del self._answers[name, family]
            return None
        self._answers.move_to_end((name, family))
        return found[1]

    def put(self, name: str, family: Family, answer: Answer) -> None:
        """Keep ``answer``, and forget the one that was used least recently if there are too many."""
        if answer.ttl <= 0 or not self._size:
            return
        self._answers[name, family] = (self._clock() + answer.ttl, answer)
        self._answers.move_to_end((name, family))
        if len(self._answers) > self._size:
            self._answers.popitem(last=False)

    def clear(self) -> None:
        """Forget everything: other servers may say something else."""
        self._answers.clear()

"""How a change of a policy is made known: by the revision, on disk, and in the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from .bans import Bans
from .journal import Journal
from .keeping import Keeping
from .tables import Tables

__all__ = ["Changes"]

_OF_SINGLE_RULES: Final = {"add", "remove"}
"""What the journal says of them is not synced: there may be thousands in a second."""


class Changes:
    """Raises revisions and notes what was done. To be used under the policy's lock."""

    def __init__(self, tables: Tables, keeping: Keeping, bans: Bans) -> None:
        self._tables = tables
        self._bans = bans
        self._keeping = keeping
        self._journal: Journal | None = None
        self.unsynced = False
        """Whether there is something that did not have to reach the disk at once."""

    def note_in(self, journal: Journal) -> None:
        """Note changes there from now on."""
        self._journal = journal

    def noted(self, count: int | None) -> list[dict[str, object]]:
        """Return the last entries of the journal (None: all there are), the oldest first."""
        return [] if self._journal is None else self._journal.read(count)

    def sync(self) -> None:
        """Have the journal reach the disk."""
        if self._journal is not None:
            self._journal.sync()

    def note(self, what: str, revision: int, **details: object) -> None:
        """Write an entry; details that are None are left out."""
        self._note(what, {**details, "revision": revision}, None)

    def note_later(self, when: float, what: str, revision: int, **details: object) -> None:
        """Write an entry of what was done at ``when``, a time of :func:`time.time`."""
        self._note(what, {**details, "revision": revision}, when)

    def _note(self, what: str, details: Mapping[str, object], when: float | None) -> None:
        self.unsynced |= what not in _OF_SINGLE_RULES
        if self._journal is not None:
            self._journal.append(what, {name: value for name, value in details.items() if value is not None}, when)

    def made(self, keep: Callable[[int], int | None] | None = None) -> int:
        """Have a change written down, raise the revision and return it. Raises OSError where either cannot be done;
        then neither is."""
        gate = self._tables.gate()
        mark = None if keep is None else keep(gate.revision + 1)
        try:
            self._tables.put_gate(replace(gate, revision=gate.revision + 1))
        except OSError:
            self._keeping.take_back(mark)
            raise
        return gate.revision + 1

    def next_of_bans(self) -> Mapping[str, int]:
        """The revisions after a change of a ban: read before, for nothing may fail when it is done."""
        return {"revision": self._tables.gate().revision, "ban_revision": self._bans.revision + 1}

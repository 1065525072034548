"""What the audit puts in order in a policy: each repair is a change of its own, with its line in the journal.

The checks (:mod:`.integrity`) say what differs; here is what brings it back, or takes it away. All wait for the
policy's lock, and may raise OSError where the kernel or the disk refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..kernel.gate_state import GateState
from .ban_book import BanBook
from .ban_walk import BanRound, BanWalk
from .changes import Changes
from .failsafe import Failsafe
from .image import RuntimeRule
from .keeping import Keeping
from .loaded_set import LoadedSet
from .rule import Ban, PolicyError, RuleSet, Settings, source_text
from .rule_room import RuleRoom
from .runtime_rules import RuntimeRules
from .tables import Exclusive, Place, Tables

__all__ = ["Repairs"]


class Repairs:
    """The repairs of one store, over its parts. ``rebuild`` derives anew what programs are told, ``undo_trial`` puts
    the set before a trial into force, ``load`` a set with its settings."""

    def __init__(
        self,
        tables: Tables,
        exclusive: Exclusive,
        changes: Changes,
        loaded: LoadedSet,
        runtime: RuntimeRules,
        room: RuleRoom,
        failsafe: Failsafe,
        keeping: Keeping,
        ban_book: BanBook,
        *,
        rebuild: Callable[[], None],
        undo_trial: Callable[[], int],
        load: Callable[[RuleSet, Settings], None],
    ) -> None:
        self._tables = tables
        self._exclusive = exclusive
        self._changes = changes
        self._loaded = loaded
        self._runtime = runtime
        self._room = room
        self._failsafe = failsafe
        self._keeping = keeping
        self._ban_book = ban_book
        self._rebuild = rebuild
        self._undo_trial = undo_trial
        self._load = load

    # -- the record and the set ----------------------------------------------------------------------------------

    def load_again(self) -> None:
        """Make the set in force anew: from disk, or of its own description where the disk has not got it (yet).

        A set on trial is undone: nothing tells what it was to be. Raises OSError or :class:`PolicyError`."""
        with self._exclusive():
            if self._loaded.pending is not None:
                self._changes.note("rollback", self._undo_trial(), reason="the audit")
                return
            kept, settings = self._keeping.on_disk(), self._loaded.settings()
            self._load(self._loaded.ruleset() if kept is None else kept.ruleset, settings)

    def put_record_back(self, known: GateState | None) -> None:
        """Have the record as it was ``known`` to be, with a revision of its own, or else as the disk says. Raises
        OSError or :class:`PolicyError`."""
        with self._exclusive():
            kept = None if known is not None else self._keeping.on_disk()
            if known is None and kept is None:
                raise PolicyError("nothing tells what it was: load a set, or start the server anew")
            self._loaded.put_record_back(known)
            self._rebuild()
            if kept is None:
                return
            gate = self._tables.gate()
            if gate.revision < kept.revision:
                self._tables.put_gate(replace(gate, revision=kept.revision))
            self._failsafe.replace(kept.failsafe, kept.failsafe_ports)
            self._load(kept.ruleset, kept.ruleset.settings)

    # -- rules at run time ---------------------------------------------------------------------------------------

    @property
    def rules_on_disk(self) -> Path | None:
        """Where the rules at run time are on disk, a row each; None if they are not, or not all of them."""
        return self._keeping.rules_on_disk

    def places_on_disk(self) -> set[Place]:
        """Return where the disk has rules at run time, also such as have ended. It reads all. Raises OSError."""
        return self._keeping.places_on_disk()

    def put_back(self, place: Place, one: RuntimeRule | None) -> None:
        """Have at a place of the runtime layer what the disk has there: a rule, or none."""
        with self._exclusive():
            if one is None:
                self._runtime.drop(*place)
            else:
                self._room.place(one.rule, one.created)
            self._changes.note("put back", self._changes.made(), source=str(place[0]), port=place[1] or None)

    # -- bans ----------------------------------------------------------------------------------------------------

    def walk_bans(self) -> BanWalk | None:
        """Return a walk through the bans on disk, None where none are kept."""
        return self._ban_book.walk()

    @property
    def bans_on_disk_are_all(self) -> bool:
        """Whether the bans on disk are those that are to be in force."""
        return self._ban_book.is_witness

    def unknown_bans(self, ended: BanRound) -> list[Ban]:
        """Return the bans in force that a whole round of :meth:`walk_bans` has not met."""
        return self._ban_book.unknown(ended)

    def is_unknown_ban(self, ended: BanRound, ban: Ban) -> bool:
        """Under the policy's lock: whether a ban is in force, and not on disk."""
        return self._ban_book.is_unknown(ended, ban)

    def take_ban_away(self, ban: Ban) -> None:
        """Take a ban out of force that is not on disk."""
        with self._exclusive():
            revisions = self._changes.next_of_bans()
            self._ban_book.take_away(ban)
            self._changes.note("ban taken away", **revisions, address=source_text(ban.network))

    def bring_back_ban(self, ban: Ban) -> None:
        """Put a ban that is on disk, and was lost, into force again."""
        with self._exclusive():
            revisions = self._changes.next_of_bans()
            self._ban_book.bring_back(ban)
            self._changes.note("ban put back", **revisions, address=source_text(ban.network))

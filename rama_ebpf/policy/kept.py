"""The policy on disk, so that it belongs to the host: it outlives the server, the pins, and the machine's uptime.

Two files in the instance's state directory, beside the bans: ``policy`` has the loaded set, settings and failsafe, and
is replaced as a whole; ``rules`` has the rules at run time, a row for each that is made or taken back. Each carries
the revision that it belongs to. The kernel's maps come first: a change is in force when it is written here, and is
undone where the disk refuses. So pins are never older than the disk, unless older ones were put in their place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Final

from ..kernel.gate_state import LAST_REVISION
from . import document
from .atomic import bring_to_disk, open_regular, write_atomically
from .image import PolicyImage, RuntimeRule
from .kept_history import KeptHistory
from .lifetime import HasEnded, MayHaveEnded, boot_id, host_id, is_of_this_boot, lifetime_of, lifetime_row
from .prefixes import IPNetwork
from .row_log import RowLog
from .rule import Action, PolicyError, Rule, RuleSet, SynLimit, boottime_ns
from .tables import Place

__all__ = ["KeptPolicy", "KeptRow", "KeptRules", "PolicyDamaged", "kept_row"]

log = logging.getLogger(__name__)

_FORMAT: Final = 1
_LARGEST: Final = 1 << 30
_LONGEST_HEADER: Final = 1 << 20
_LONGEST_ROW: Final = 1 << 16
_LATEST: Final = (1 << 63) - 1
_ENDED: Final = 1
"""An end in the past of every boot."""


class _TooMany(Exception):
    """More rules at run time than there may be."""


class PolicyDamaged(OSError):
    """What is on disk is not what was written there. The text names the file."""


@dataclass(frozen=True, slots=True)
class KeptRules:
    """What ``rules`` says. ``earlier`` are the places of rules that were written in an earlier boot and end, by when
    they were created; of those, ``doubtful`` may have ended, if the wall clock is right."""

    revision: int | None
    rules: Mapping[Place, RuntimeRule]
    earlier: Mapping[Place, int]
    doubtful: Collection[Place]


class KeptPolicy:
    """The files in a directory. Calls are made under the policy's lock. All raise OSError where the file system
    refuses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._set = directory / "policy"
        self._rules = RowLog(directory / "rules")
        self.history = KeptHistory(directory / "history")
        self._since = boottime_ns()

    @property
    def rules_path(self) -> Path:
        """Where the rules at run time are."""
        return self._rules.path

    def read(self, most: int | None = None) -> PolicyImage | None:
        """Return what is kept, None if nothing ever was. Raises :class:`PolicyDamaged` for a set that was damaged; a
        row of a rule that was is left out, and the log says so. Raises :class:`.rule.PolicyError` for more rules at run
        time than ``most``, before all of them are read."""
        image = self._read_set()
        kept = self.read_rules(most)
        if image is None and kept.revision is None:
            return None
        image = image or PolicyImage(0, RuleSet())
        revision = max(image.revision, kept.revision or 0)
        return replace(image, revision=revision, runtime=tuple(kept.rules.values()))

    def is_of_another_host(self) -> bool:
        """Whether the set was written on another machine, by its machine-id(5)."""
        try:
            with open(open_regular(self._set, os.O_RDONLY), "rb") as file:
                host = json.loads(file.readline(_LONGEST_HEADER)).get("host")
        except (OSError, ValueError, AttributeError, RecursionError):
            return False  # nothing is there, or it is damaged, and whoever reads it says so
        return isinstance(host, str) and bool(host and host_id()) and host != host_id()

    def revision(self) -> int:
        """Return the revision of what was written last, 0 if nothing can be read."""
        found = 0
        for path, last in ((self._set, False), (self._rules.path, True)):
            try:
                fd = open_regular(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            with open(fd, "rb") as file:
                if last:
                    file.seek(max(0, os.fstat(fd).st_size - _LONGEST_ROW))
                lines = file.readlines(_LONGEST_ROW) if last else [file.readline(_LONGEST_HEADER)]
            for line in reversed(lines):
                with contextlib.suppress(
                    ValueError, LookupError, TypeError, RecursionError
                ):  # torn, or not from its start
                    found = max(found, _revision(json.loads(line)))
                    break
        return found

    def write(self, image: PolicyImage) -> None:
        """Replace everything."""
        self.write_set(image)
        self._rules.rewrite([{"revision": image.revision}, *(_row(one, image.revision) for one in image.runtime)])

    def write_set(self, image: PolicyImage) -> None:
        """Replace all but the rules at run time."""
        body = document.encode(image.ruleset)
        header: dict[str, object] = {
            "format": _FORMAT,
            "revision": image.revision,
            "failsafe": [str(network) for network in image.failsafe],
            "failsafe_ports": list(image.failsafe_ports),
            "host": host_id(),
            "boot": boot_id(),
            "boottime": boottime_ns(),
            "time": time.time(),
            "size": len(body),
            "set": hashlib.sha256(body).hexdigest(),
        }
        header["sha256"] = _checksum(header, body)
        try:
            self.history.remember(self._set, str(header["set"]))
            write_atomically(self._set, json.dumps(header).encode() + b"\n" + body)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self._set}: {error.strerror}") from error

    def sync_set(self) -> None:
        """Have what :meth:`write_set` wrote be there under its name also after a power failure."""
        bring_to_disk(self._set)

    def added(self, added: Sequence[RuntimeRule], revision: int) -> int:
        """Note rules at run time, all or none; return what :meth:`take_back` needs."""
        return self._append([_row(one, revision) for one in added])

    def removed(self, network: IPNetwork, port: int, revision: int) -> int:
        """Note that the rule of a prefix and port (0: any) was taken back; return what :meth:`take_back` needs."""
        return self._append([{"revision": revision, "source": str(network), "port": port, "removed": True}])

    def added_alike(self, texts: Sequence[str], model: Rule, created: int, revision: int) -> int:
        """Note rules that differ from ``model`` by their source, as text, and the name that follows from it."""
        row = _row(RuntimeRule(model, created), revision)
        named = f'", "name": "{model.action.name.lower()}:'
        rest = json.dumps({name: value for name, value in row.items() if name not in ("source", "name")})[1:]
        return self._append_lines("".join([f'{{"source": "{text}{named}{text}", {rest}\n' for text in texts]).encode())

    def removed_all(self, texts: Sequence[str], port: int, revision: int) -> int:
        """Note that many rules of one port (0: any) were taken back."""
        rest = json.dumps({"revision": revision, "port": port, "removed": True})[1:]
        return self._append_lines("".join([f'{{"source": "{text}", {rest}\n' for text in texts]).encode())

    def take_back(self, mark: int) -> None:
        """Forget what was noted since."""
        self._rules.cut(mark)

    def forget(self) -> None:
        """Remove the files."""
        for path in (self._set, self._rules.path, self.directory / "clients"):
            path.unlink(missing_ok=True)
        self.history.forget()

    def past_set(self, revision: int) -> RuleSet:
        """Return a set that was in force before. Raises :class:`PolicyError` if it is not kept."""
        past = next((past for past in self.history.all() if past.revision == revision), None)
        if past is None:
            raise PolicyError(f"no set of revision {revision} is kept: policy history shows those that are")
        image = self._read_image(past.path)
        assert image is not None
        return image.ruleset

    @property
    def is_overgrown(self) -> bool:
        """Whether the rows are many more than the rules that there were: time to :meth:`write` all anew."""
        return self._rules.overgrown()

    def _append(self, rows: Sequence[Mapping[str, object]]) -> int:
        return self._append_lines(b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    def _append_lines(self, lines: bytes) -> int:
        mark = self._rules.extend_lines(lines)
        try:
            self._rules.sync()
        except OSError as error:
            self._rules.cut(mark)
            raise OSError(error.errno, f"cannot write {self._rules.path}: {error.strerror}") from error
        return mark

    def _read_set(self) -> PolicyImage | None:
        return self._read_image(self._set)

    @staticmethod
    def _read_image(path: Path) -> PolicyImage | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
                raise PolicyDamaged(errno.EINVAL, f"{path} is no file of ours")
            line, body = file.readline(_LONGEST_HEADER), file.read(_LARGEST)
        try:
            return _image(line, body)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise PolicyDamaged(errno.EINVAL, f"{path} is damaged: {error}") from error

    def read_rules(self, most: int | None = None) -> KeptRules:
        """Return the rules at run time, judged by the clocks as they are now. ``most``: see :meth:`read`."""
        rules: dict[Place, RuntimeRule] = {}
        earlier: dict[Place, int] = {}
        doubtful: set[Place] = set()
        revision: int | None = None
        damaged = 0
        for row in self._rules.rows():
            try:
                if row is None:
                    raise ValueError("no row")
                of_row = _revision(row)
                if "source" in row:
                    place = ip_network(str(row["source"])), _whole(row["port"], 65535)
                    rule, in_doubt = _judged(place, row, self._since)
                    rules.pop(place, None)
                    earlier.pop(place, None)
                    doubtful.discard(place)
                    if rule is not None:
                        rules[place] = rule
                        if most is not None and len(rules) > most:
                            raise _TooMany
                    if in_doubt:
                        doubtful.add(place)
                    if not row.get("removed") and not is_of_this_boot(row):
                        earlier[place] = _whole(row["created"], _LATEST)
            except _TooMany:
                text = f"{self._rules.path} has more rules at run time than there is room for; restart with --max-rules"
                raise PolicyError(f"{text} above {most}") from None
            except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
                damaged += 1
                continue
            revision = max(revision or 0, of_row)
        if damaged:
            log.warning("%d lines of %s are damaged and left out", damaged, self._rules.path)
        return KeptRules(revision, rules, earlier, doubtful)


def _checksum(header: Mapping[str, object], body: bytes) -> str:
    told = json.dumps({name: value for name, value in header.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(told.encode() + b"\n" + body).hexdigest()


def _image(line: bytes, body: bytes) -> PolicyImage:
    header = json.loads(line)
    if header["format"] != _FORMAT:
        raise ValueError(f"format {header['format']}, this version knows {_FORMAT}")
    if len(body) != header["size"] or header["sha256"] != _checksum(header, body):
        raise ValueError("its checksum is another one")
    written, at = float(header["time"]), int(header["boottime"])

    def in_this_boot(rule: Rule) -> Rule:
        if rule.expires is None:
            return rule
        left = (rule.expires - at) / 1e9
        row = {"until": written + left, "left": left, "boot": header["boot"], "boot_until": rule.expires}
        try:
            return replace(rule, expires=lifetime_of(row))
        except MayHaveEnded:  # deny while in doubt, for no longer than was left
            return replace(rule, expires=_ENDED if rule.action is Action.ALLOW else boottime_ns() + round(left * 1e9))
        except HasEnded:
            return replace(rule, expires=_ENDED)

    ruleset = document.decode(body)
    return PolicyImage(
        _revision(header),
        replace(ruleset, rules=tuple(map(in_this_boot, ruleset.rules))),
        tuple(map(ip_network, header["failsafe"])),
        tuple(_whole(port, 65535) for port in header["failsafe_ports"]),
    )


def _revision(row: Mapping[str, object]) -> int:
    return _whole(row["revision"], LAST_REVISION - 1)


def _whole(value: object, most: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{value!r}: not 0 to {most}")
    return value


def _row(one: RuntimeRule, revision: int) -> dict[str, object]:
    rule, (network, port) = one.rule, one.place
    return {
        "revision": revision,
        "source": str(network),
        "port": port,
        "name": rule.name,
        "action": rule.action.name.lower(),
        "dry_run": rule.dry_run,
        "limit": None if rule.limit is None else [rule.limit.rate, rule.limit.burst],
        "reason": rule.reason,
        "origin": rule.origin,
        "created": one.created,
        **lifetime_row(rule.expires),
    }


@dataclass(frozen=True, slots=True)
class KeptRow:
    """What a row says of a place: its rule, None for one that was taken back."""

    place: Place
    rule: RuntimeRule | None
    is_certain: bool
    """Not of a rule that has ended, nor of one that ends by the wall clock, which may be set."""


def kept_row(line: bytes) -> KeptRow | None:
    """Return what a line of the rules says, None for one that is about no place, or damaged."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or "source" not in row:
            return None
        place = ip_network(str(row["source"])), _whole(row["port"], 65535)
        if row.get("removed"):
            return KeptRow(place, None, is_certain=True)
        if row["until"] is not None and not is_of_this_boot(row):
            return KeptRow(place, None, is_certain=False)
        rule, _ = _judged(place, row, 0)
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None
    return KeptRow(place, rule, rule is not None)


def _judged(place: Place, row: Mapping[str, object], since: int) -> tuple[RuntimeRule | None, bool]:
    """Return the rule of a row, None if it was taken back or has ended, and whether it may be in force all the same."""
    if row.get("removed"):
        return None, False
    limit = row["limit"]
    if limit is not None and not isinstance(limit, list):
        raise PolicyError("a limit is a rate and a burst")
    try:
        expires = lifetime_of(row, since)
    except HasEnded as ended:
        return None, isinstance(ended, MayHaveEnded)
    network, port = place
    rule = Rule(
        str(row["name"]),
        (network,),
        Action[str(row["action"]).upper()],
        port or None,
        expires,
        row["dry_run"] is True,
        None if limit is None else SynLimit(float(limit[0]), int(limit[1])),
        str(row["reason"]),
        str(row["origin"]),
    )
    return RuntimeRule(rule, _whole(row["created"], _LATEST)), False

"""Trying an operation at each of its calls: killed before it, and with the call failing.

What must hold after each, whatever happened:

- each source meets what it would have met before the operation or after it;
- after an error: exit code 0 goes with the verdicts of after, another one with those of before, or says that the change
  is in force all the same; it is said in words, and not by a traceback;
- ``test`` says what the kernel does, ``list`` shows what was listed before or after, ``status`` knows the server;
- one more command of each kind works, and is enforced; so is the policy after a crash and a start. (Tried once for each
  state that points leave behind, not for each point.)
"""

from __future__ import annotations

import errno
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rama_ebpf.kernel import bpf
from rama_ebpf.policy.rule import PolicyError

from .forkserver import CommandRunner, Outcome
from .interpose import Call, Fault
from .operations import BASELINE, Operation
from .scene import Policy, Scene, Verdicts

__all__ = ["ERRORS", "Trial", "points"]

ERRORS = (errno.ENOMEM, errno.EAGAIN, errno.E2BIG, errno.ENOSPC, errno.EIO)
_STRENGTH = {"in": 0, "rst": 1, "silence": 1}


def points(calls: Sequence[Call], *, every: int) -> Iterator[Fault]:
    """All points of a run: at calls that change something death and each error, at others death and an error in turn.

    ``every`` above 1 is for a part: of the calls that change something death and one error in turn, of the others
    every so many an error, which death between two changes is no other for."""
    errors = itertools.cycle(ERRORS)
    for at, call in enumerate(calls):
        if every > 1:
            if call.changes:
                yield Fault(at)
                yield Fault(at, next(errors))
            elif at % every == 0:
                yield Fault(at, next(errors))
            continue
        yield Fault(at)
        for error in ERRORS if call.changes else (next(errors),):
            yield Fault(at, error)


@dataclass
class Trial:
    """Tries operations on one scene. ``faults`` are what did not hold."""

    scene: Scene
    runner: CommandRunner
    directory: Path
    restarts: bool = True
    tried: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    restarted: int = 0
    faults: list[str] = field(default_factory=list)
    _baseline: Policy | None = None
    _known: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Make the policy that all operations begin with."""
        for words in BASELINE:
            outcome = self.runner.run(words)
            assert outcome.code == 0, (words, outcome)
        self._baseline = self.scene.save()

    def run(self, operation: Operation, *, every: int = 1) -> None:
        """Try all points of an operation, or a part of them (see :func:`points`): then a crash and a start follow one
        death alone, and not each state that is new."""
        scene, runner = self.scene, self.runner
        assert self._baseline is not None
        scene.put_back(self._baseline)
        operation.begin(scene, runner, self.directory)
        start = scene.save()
        before, listed_before = scene.connect_all(), scene.listed()
        clean = runner.run(operation.words, watched=True)
        assert clean.code == 0, (operation.name, clean)
        after, listed_after = scene.connect_all(), scene.listed()
        started = self.restarted
        for fault in points(clean.calls, every=every):
            scene.put_back(start)
            outcome = runner.run(operation.words, fault=fault)
            if not outcome.happened:
                continue  # this run had fewer calls
            self.tried += 1
            found = self._look()
            call = outcome.calls[fault.at]
            wrong = _judged(found, before, after, listed_before, listed_after)
            wrong += _words(outcome, fault, found.met, before if operation.is_one_change else found.met, after)
            if not scene.status()["running"]:
                wrong.append("status does not know the server")
            digest = scene.digest()
            if digest not in self._known:
                self._known.add(digest)
                begun = time.monotonic()
                right = (found.met, after) if fault.error else (found.met, after, before)
                wrong += self._afterwards(right, restart=self._starts(fault, every, started))
                self.seconds["afterwards"] += time.monotonic() - begun
            self.faults += [f"{operation.name}, {fault} {fault.at} {call}: {text}" for text in wrong]
        _close(start)

    def _starts(self, fault: Fault, every: int, before: int) -> bool:
        """Whether the state that a point has left is crashed and started from; ``before`` is how many were when the
        operation began."""
        return self.restarts and (every == 1 or (not fault.error and self.restarted == before))

    def _look(self) -> _Found:
        """Ask the kernel and commands. The server may just be putting in order what a killed writer left."""
        scene = self.scene
        for left in (2, 1, 0):
            try:
                found = _Found(scene.connect_all(), scene.told(), scene.listed())
            except PolicyError:  # the set was replaced while its document was read
                if not left:
                    raise
                continue
            if found.met == found.told:
                break
        return found

    def _afterwards(self, right: Sequence[Verdicts], *, restart: bool) -> list[str]:
        """Crash and start, after which verdicts are one of those that are ``right``, then use one command of each kind,
        and say what did not work. What a command that was killed has put in force and not on disk yet is nobody's: the
        audit takes it away, if it comes by before the crash, and all is as it was before."""
        scene = self.scene
        wrong: list[str] = []
        kept = scene.save()
        if restart:
            self.restarted += 1
            try:
                scene.restart()
            except AssertionError as error:
                wrong.append(f"no start after a crash: {error}")
                scene.proxy.start()
            found = scene.connect_all()
            if found not in right:  # a start reads feeds, and bans from disk
                wrong.append(f"after a crash and a start {_difference(found, right[0])}")
        if "trial True" in scene.listed():
            wrong += self._one_more(("policy", "rollback"), {})
        for words, expected in _ONE_MORE:
            wrong += self._one_more(words, expected)
        scene.put_back(kept)
        _close(kept)
        return wrong

    def _one_more(self, words: tuple[str, ...], expected: dict[str, str]) -> list[str]:
        outcome = self.runner.run(words)
        if outcome.code != 0 and expected:
            return [f"afterwards {' '.join(words)} says {outcome.code}: {outcome.output.strip()[-300:]}"]
        met = self.scene.connect_all()
        wrong = {name: met[name] for name, verdict in expected.items() if met[name] != verdict}
        if met != self.scene.told():
            return [f"after {' '.join(words)} test and kernel part: {_difference(self.scene.told(), met)}"]
        return [f"after {' '.join(words)} {wrong}, wanted {expected}"] if wrong else []


_ONE_MORE: Sequence[tuple[tuple[str, ...], dict[str, str]]] = (
    (("policy", "load", "b.toml"), {"beside the set": "rst", "in the set": "in"}),
    (("unblock", "198.18.1.2"), {}),
    (("block", "198.18.1.2/31", "--reject"), {"target": "rst", "neighbour": "rst"}),
    (("block", "198.18.1.3"), {"target": "rst", "neighbour": "silence"}),
    (("allow", "198.18.1.2"), {"target": "in", "neighbour": "silence"}),
    (("ban", "198.18.1.2"), {"target": "silence"}),
    (("unblock", "198.18.1.2"), {"target": "rst"}),
    (("block", "2001:db8:1::2/127", "--port", "1080"), {"target IPv6": "silence"}),
    (("unblock", "2001:db8:1::2/127", "--port", "1080"), {"target IPv6": "rst"}),
    (("policy", "load", "a.toml", "--confirm-timeout", "1h"), {"beside the set": "in", "in the set": "silence"}),
    (("policy", "rollback"), {"beside the set": "rst", "in the set": "in"}),
    (("policy", "load", "a.toml", "--confirm-timeout", "1h"), {"beside the set": "in", "in the set": "silence"}),
    (("policy", "confirm"), {"beside the set": "in", "in the set": "silence"}),
    (("writer", "sweep"), {"in the set": "silence", "neighbour": "silence"}),
    (("writer", "failsafe"), {"blocked": "in"}),
)


@dataclass(frozen=True)
class _Found:
    met: Verdicts
    told: Verdicts
    listed: frozenset[str]


def _judged(
    found: _Found, before: Verdicts, after: Verdicts, listed_before: frozenset[str], listed_after: frozenset[str]
) -> list[str]:
    wrong = []
    for name, met in found.met.items():
        if met not in (before[name], after[name]):
            weaker = _STRENGTH.get(met, 0) < min(_STRENGTH[before[name]], _STRENGTH[after[name]])
            wrong.append(f"{name} met {met}, before {before[name]}, after {after[name]}{': OPEN' if weaker else ''}")
    if found.met != found.told:
        wrong.append(f"test and kernel part: {_difference(found.told, found.met)}")
    if strange := found.listed - listed_before - listed_after:
        wrong.append(f"listed, neither before nor after: {sorted(strange)}")
    if missing := (listed_before & listed_after) - found.listed:
        wrong.append(f"not listed, though before and after: {sorted(missing)}")
    return wrong


def _words(outcome: Outcome, fault: Fault, met: Verdicts, before: Verdicts, after: Verdicts) -> list[str]:
    if not fault.error:
        return [] if outcome.code == -9 else [f"killed, and exit {outcome.code}"]
    wrong = []
    text = outcome.output.strip()
    if "Traceback" in text:
        wrong.append(f"a traceback: {text[-400:]}")
    if outcome.code not in (0, 2, 3):
        wrong.append(f"exit {outcome.code}: {text[-200:]}")
    in_force = "in force" in text or "recorded, but" in text
    if outcome.code == 0 and met != after:
        wrong.append(f"exit 0 ({text[-200:]}), but {_difference(met, after)}")
    if outcome.code != 0 and met != before and not (in_force and met == after):
        wrong.append(f"exit {outcome.code} ({text[-200:]}), but {_difference(met, before)}")
    if outcome.code != 0 and not text:
        wrong.append("fails without a word")
    return wrong


def _difference(found: Verdicts, wanted: Verdicts) -> str:
    return ", ".join(f"{name} {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name])


def _close(policy: Policy) -> None:
    for fds in policy.sets.values():
        for fd in fds:
            bpf.close(fd)

"""What is killed and made to fail: each command that changes the policy, and each of the server's own writers.

Each begins with the policy of :data:`BASELINE`, changed by ``prepare``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .forkserver import CommandRunner
from .scene import Scene

__all__ = ["BASELINE", "OPERATIONS", "Operation", "write_files"]

Words = tuple[str, ...]

SET_A = """
default = "allow"
[[rules]]
name = "a"
action = "drop"
sources = ["198.18.5.0/25", "2001:db8:2::/48"]
[[rules]]
name = "b"
action = "reject"
port = 443
sources = ["198.18.6.0/24"]
"""
SET_B = """
default = "allow"
[[rules]]
name = "b"
action = "reject"
sources = ["198.18.5.128/25", "2001:db8:1::/64"]
"""
SHUT = """
default = "drop"
[[rules]]
name = "office"
action = "allow"
sources = ["198.18.1.0/24", "2001:db8:2::/48"]
"""
FEED = """
[[rules]]
name = "feed"
action = "drop"
feed = { file = "feed.txt" }
"""


def write_files(directory: Path) -> None:
    """Write the policy files that operations load."""
    for name, text in (("a", SET_A), ("b", SET_B), ("shut", SHUT), ("feed", FEED)):
        (directory / f"{name}.toml").write_text(text)
    (directory / "feed.txt").write_text("198.18.5.0/25\n")


def _load(name: str, *more: str) -> Words:
    return ("policy", "load", f"{name}.toml", *more)


BASELINE: Sequence[Words] = (
    ("block", "198.18.1.1"),
    ("block", "198.18.2.0/24"),
    ("allow", "198.18.2.10"),
    ("ban", "198.18.3.1"),
    ("writer", "failsafe of the baseline"),
    ("block", "198.18.4.0/24"),
    ("block", "2001:db8:1::1"),
    _load("a"),
)


def _feed_changes(scene: Scene, directory: Path) -> None:
    (directory / "feed.txt").write_text("198.18.5.128/25\n2001:db8:1::/64\n")


def _feed_as_it_was(scene: Scene, directory: Path) -> None:
    (directory / "feed.txt").write_text("198.18.5.0/25\n")


def _wait(scene: Scene, directory: Path) -> None:
    """Let what has a TTL of a second end, by the kernel's clock."""
    end = time.clock_gettime(time.CLOCK_BOOTTIME) + 1.1
    while (left := end - time.clock_gettime(time.CLOCK_BOOTTIME)) > 0:
        time.sleep(left)


@dataclass(frozen=True)
class Operation:
    """``words`` is what is run, after the commands and functions of ``prepare``."""

    name: str
    words: Words
    prepare: Sequence[Words | Callable[[Scene, Path], None]] = ()
    in_tests: bool = True
    """Whether a part of its points is tried in ``make test``."""
    is_one_change: bool = True
    """Whether it is done or not; else a failure may leave a part of it done."""

    def begin(self, scene: Scene, runner: CommandRunner, directory: Path) -> None:
        """Bring about what it begins with."""
        for step in self.prepare:
            if callable(step):
                step(scene, directory)
                continue
            outcome = runner.run(step)
            assert outcome.code == 0, (step, outcome)


_TRIAL = _load("shut", "--confirm-timeout", "1h")
_ENDED = (("block", "198.18.1.2/31", "--ttl", "1s"), ("ban", "2001:db8:1::2", "--ttl", "1s"), _wait)

OPERATIONS: Sequence[Operation] = (
    Operation("block", ("block", "198.18.1.2"), in_tests=False),
    Operation("block of a first length", ("block", "198.18.1.2/31", "--ttl", "1h")),
    Operation("first block on a port", ("block", "2001:db8:1::2/127", "--port", "1080", "--reject")),
    Operation("block over an allow", ("block", "198.18.2.10"), in_tests=False),
    Operation("first block", ("block", "198.18.1.2"), [("writer", "forget rules")], in_tests=False),
    Operation("allow over a block", ("allow", "198.18.1.1", "--ttl", "1h"), in_tests=False),
    Operation("allow", ("allow", "198.18.2.9"), in_tests=False),
    Operation("unblock", ("unblock", "198.18.1.1"), in_tests=False),
    Operation("unblock of a last length", ("unblock", "2001:db8:1::1")),
    Operation("ban", ("ban", "198.18.1.2", "--ttl", "1h")),
    Operation("first ban", ("ban", "198.18.1.2"), [("unblock", "198.18.3.1"), ("writer", "sweep")], in_tests=False),
    Operation("ban over a ban", ("ban", "198.18.3.1", "--ttl", "1h", "--reject"), in_tests=False),
    Operation("unban", ("unblock", "198.18.3.1")),
    Operation("unblock and unban", ("unblock", "198.18.1.1"), [("ban", "198.18.1.1")], in_tests=False),
    Operation("load", _load("b")),
    Operation("load of another default", _load("shut"), in_tests=False),
    Operation("load of a default that lets in", _load("a"), [_load("shut")], in_tests=False),
    Operation("load on trial", _TRIAL),
    Operation("confirm", ("policy", "confirm"), [_TRIAL]),
    Operation("rollback", ("policy", "rollback"), [_TRIAL]),
    Operation("load of a feed", _load("feed"), [_feed_as_it_was], in_tests=False),
    Operation("refresh", ("policy", "refresh"), [_feed_as_it_was, _load("feed"), _feed_changes]),
    Operation("sweep", ("writer", "sweep"), _ENDED),
    Operation(
        "sweep of a trial", ("writer", "sweep"), [_load("shut", "--confirm-timeout", "1s"), _wait], in_tests=False
    ),
    Operation("restore bans", ("writer", "restore bans"), [("writer", "forget bans")], is_one_change=False),
    Operation("strike", ("writer", "strike")),
    Operation("strike of a banned one", ("writer", "strike a banned one"), in_tests=False),
    Operation("failsafe", ("writer", "failsafe")),
    Operation("no failsafe", ("writer", "no failsafe"), in_tests=False),
    Operation("default drop", ("writer", "default drop")),
    Operation("default allow", ("writer", "default allow"), [("writer", "default drop")], in_tests=False),
    Operation(
        "feeds by the clock", ("writer", "feeds"), [_feed_as_it_was, _load("feed"), _feed_changes], in_tests=False
    ),
)

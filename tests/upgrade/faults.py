"""Where an upgrade can fail: what is wrong with a release, and which step the message names then."""

from __future__ import annotations

from dataclasses import dataclass

from .releases import Edit

__all__ = ["FAULTS", "Fault"]

_KILL = "__import__('os').kill(__import__('os').getpid(), 9)"
_FAIL = "raise OSError(5, 'made to fail')"


@dataclass(frozen=True)
class Fault:
    """``step`` is what the message names; ``cuts`` says that it has clients by then, and takes them along."""

    name: str
    step: str
    edit: Edit
    cuts: bool = False


def _around(
    name: str, step: str, file: str, line: str, *, after: bool, cuts: bool = False, told: str = ""
) -> list[Fault]:
    """Death, and an error, before or after a line of the source, which stands in it once. ``told`` is the step by which
    the new server itself names an error, where that is another."""
    indent = line[: len(line) - len(line.lstrip())]
    found = []
    for how, statement in (("killed", _KILL), ("error", _FAIL)):
        lines = [f"{indent}{statement}\n", line] if not after else [line, f"\n{indent}{statement}"]
        found.append(
            Fault(f"{name}: {how}", step if how == "killed" else told or step, (file, line, "".join(lines)), cuts)
        )
    return found


_REVISION, _DAEMON, _HOST = "control/revision.py", "control/daemon.py", "control/policy_host.py"
_TAKEOVER = "control/takeover.py"

FAULTS: list[Fault] = [
    Fault("broken release", "start", (_DAEMON, "import signal\n", "import signal\n\nimport no_such_module\n")),
    Fault("another layout", "layout", ("_bpf/policy.h", "LAYOUT_VERSION = ", "LAYOUT_VERSION = 9")),
    Fault("another protocol", "version", ("control/succession.py", "PROTOCOL: Final = 1", "PROTOCOL: Final = 2")),
    Fault(
        "workers that do not start",
        "workers",
        ("process/worker.py", "        worker.prepare()\n", "        raise OSError(5, 'made to fail')\n"),
    ),
    Fault(
        "workers that do not stay",
        "probation",
        (
            "process/worker.py",
            "        if not self._stop.is_set():\n            for server in self._servers:\n",
            "        os._exit(7)\n        if not self._stop.is_set():\n            for server in self._servers:\n",
        ),
        cuts=True,
    ),
    *_around(
        "before it speaks",
        "start",
        _TAKEOVER,
        "    estate = predecessor.estate(instance)",
        after=False,
        told="configuration",
    ),
    *_around("what was handed over", "programs", _TAKEOVER, '            predecessor.at("programs")', after=True),
    *_around("the gate", "programs", _HOST, "        gate.attachments.adopt(estate.attachments, xdp)", after=True),
    *_around("the policy", "policy", _DAEMON, '            predecessor.at("policy")', after=True),
    *_around("the listeners", "listeners", _DAEMON, '            predecessor.at("listeners")', after=True),
    *_around(
        "half of the links", "programs into their links", "kernel/attachments.py", "        wanted = set()", after=False
    ),
    *_around("all links", "programs into their links", _REVISION, "        await self._to.probe()", after=False),
    *_around(
        "the gate closed",
        "programs into their links",
        _REVISION,
        "                on_loop(to.listeners.close_gate)",
        after=True,
    ),
    *_around("the other paused", "switch", _REVISION, "                    self._predecessor.pause()", after=True),
    *_around("settings", "switch", _REVISION, "                self._put_settings(options, on_loop)", after=True),
    *_around("policy in force", "switch", _REVISION, "                undo.callback(self._put_policy())", after=True),
    *_around(
        "steering",
        "switch",
        _REVISION,
        "                on_loop(lambda: to.listeners.switch(self._sockets))",
        after=True,
    ),
    *_around("the last moment", "switch", _TAKEOVER, "        parts.lock.name_us()", after=True, cuts=True),
    Fault(
        "after it serves",
        "probation",
        (
            _TAKEOVER,
            "        await asyncio.wait((supervisor.stopping,), timeout=_PROBATION_SECONDS)",
            f"        await asyncio.sleep(0.3)\n        {_KILL}",
        ),
        cuts=True,
    ),
]

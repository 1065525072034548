"""State files of a million rows, and hostile ones: a start serves, says what is wrong once, in bounded memory."""

from __future__ import annotations

import json
import os
import re
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.ban_rows import row_of
from rama_ebpf.policy.image import RuntimeRule
from rama_ebpf.policy.kept import KeptPolicy, _row
from rama_ebpf.policy.rule import Action, Ban, PolicyError, Rule

from .conftest import ALLOWED, DENIED, ROUNDS, EchoServer, StartEcho, met

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(240 if not ROUNDS else 1800)]

ROWS = 1_000_000 if ROUNDS else 20_000
_MEMORY = 700 << 20
"""What a server may take at most, in bytes, with a million rows; most of it is gone again when it serves."""


def _bans() -> Iterator[dict[str, object]]:
    model = row_of(Ban(ip_network("198.18.66.9"), Action.DROP, None, 1, 0, "x", True))
    for number in range(ROWS):
        yield model | {"address": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"}
    yield model | {"address": DENIED[1]}


def _rules(sources: Callable[[int], str]) -> Iterator[dict[str, object]]:
    network = ip_network(DENIED[1])
    model = _row(RuntimeRule(Rule(f"drop:{network}", (network,), Action.DROP), 1), 1)
    yield model
    for number in range(ROWS):
        yield model | {"source": sources(number), "revision": number + 2}


def _hostile() -> Iterator[bytes]:
    """Lines of all kinds that are none of ours, and what an attacker would write."""
    kinds = (
        b"",
        b"\0" * 80,
        b"{" * 500,
        b'{"address":"10.0.0.1","until":1e999}',
        b'{"source":"0.0.0.0/0","port":-1,"revision":1}',
        b'{"revision":1e400}',
        b'{"revision":99999999999999999999999,"source":"10.0.0.1","port":0}',
        b'["' + b"x" * 200 + b'"]',
        '{"address":"\u2028","lifted":true}'.encode(),
        os.urandom(60).replace(b"\n", b""),
    )
    for number in range(ROWS):
        yield kinds[number % len(kinds)]


def _write(path: Path, rows: Iterator[dict[str, object]] | Iterator[bytes]) -> None:
    with path.open("ab") as file:
        for row in rows:
            file.write((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n")


def _peak(pid: int) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), flags=re.M)
    assert found is not None
    return int(found[1]) << 10


@pytest.fixture
def stopped(start_echo: StartEcho) -> EchoServer:
    """A server that was killed, whose files are there. It has room for 8,191 rules."""
    server = start_echo(workers=1, server="[limits]\nmax_rules = 8192")
    server.proxy.command("block", DENIED[0])
    server.proxy.command("ban", "198.18.66.9")
    server.proxy.signal(signal.SIGKILL)
    server.proxy.end()
    return server


def _starts(server: EchoServer, lines: dict[str, int]) -> None:
    """It serves whom it served, denies whom it denied, answers commands; each file is in so many lines of the log."""
    server.proxy.start(timeout=600)
    assert server.served(ALLOWED[0])
    assert [met(server.host, source) for source in DENIED] == ["silence"] * 2
    server.proxy.command("block", ALLOWED[3], timeout=120)
    server.proxy.command("ban", ALLOWED[2], timeout=120)
    assert [met(server.host, source) for source in ALLOWED] == ["in", "in", "silence", "silence"]
    state = Instance(server.proxy.instance).state_dir
    for name, wanted in lines.items():
        said = [line for line in server.proxy.log if re.search(rf"{re.escape(str(state / name))}\b(?!\.)", line)]
        assert len(said) == wanted, server.proxy.log
    assert _peak(server.proxy.pid) < _MEMORY
    server.proxy.signal(signal.SIGTERM)
    assert server.proxy.wait(120) == 0
    assert not server.proxy.logged("Traceback"), server.proxy.log


def test_very_many_bans_and_changes_of_few_rules_are_in_force_before_anybody_is_served(stopped: EchoServer) -> None:
    state = Instance(stopped.proxy.instance).state_dir
    _write(state / "bans", _bans())
    _write(state / "rules", _rules(lambda number: f"198.18.70.{number % 200}/32"))
    _starts(stopped, {"bans": 0, "rules": 0})


def test_very_many_hostile_lines_cost_themselves_and_are_said_once(stopped: EchoServer) -> None:
    lines = {"bans": 1, "rules": 1, "journal": 0}
    for name in lines:
        _write(Instance(stopped.proxy.instance).state_dir / name, _hostile())
    _starts(stopped, lines)


def test_more_rules_than_there_is_room_for_are_refused_before_they_are_all_read(tmp_path: Path) -> None:
    """The gate would be open to those that are left out; and a file of a gigabyte is not held in memory."""
    _write(tmp_path / "rules", _rules(lambda number: f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}/32"))
    tracemalloc.start()
    try:
        with pytest.raises(PolicyError, match=f"{re.escape(str(tmp_path))}/rules.*--max-rules above 1000"):
            KeptPolicy(tmp_path).read(1000)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()

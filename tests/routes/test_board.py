"""Health that several processes share: what fails in one is known in all, and a worker that ends holds nothing."""

from __future__ import annotations

import os

import pytest

from rama_ebpf.process.shared import SharedTable
from rama_ebpf.process.ways import SharedBoard, TooManyWays
from rama_ebpf.routes import HealthLimits, State

LIMITS = HealthLimits(fall=2)
SECRET = bytes(32)


@pytest.fixture
def boards():
    fd = SharedTable.create(4)
    yield [SharedTable(fd, 4, own, SECRET).board() for own in (0, 1, None)]
    os.close(fd)


def test_failure_in_one_worker_is_known_in_all(boards: list[SharedBoard]):
    one, other, server = boards
    one.change("paris", lambda health: health.fail(100.0, LIMITS, "refused"))
    assert other.change("paris", lambda health: health.fail(101.0, LIMITS, "refused \N{SNOWMAN} " + "x" * 200))
    for board in boards:
        health = board.read("paris")
        assert (health.state, health.failures, health.since, health.until) == (
            State.DOWN,
            2,
            101.0,
            pytest.approx(111, abs=1.1),
        )
        assert health.cause.startswith("refused \N{SNOWMAN} x")
    assert one.read("oslo").usable()
    assert [row["way"] for row in server.troubled()] == ["paris"]
    assert server.states() == {"paris": False, "oslo": True}


def test_live_connections_are_summed_and_those_of_a_dead_worker_are_gone(boards):
    one, other, server = boards
    for board, count in ((one, 3), (other, 2)):
        for _ in range(count):
            board.enter("paris")
            board.tried("paris", False)
    other.tried("paris", True)
    assert one.live("paris") == 5
    one.leave("paris")
    assert server.live("paris") == 4
    server.wipe(1)
    said = server.described("paris")
    assert (said["live"], said["attempts"], said["failed"]) == (2, 6, 1)


def test_pin_of_one_worker_is_the_pin_of_all_and_takes_sixteen_bytes(boards):
    one, other, _ = boards
    keys = [os.urandom(8) for _ in range(1000)]
    for key in keys:
        one.pin(key, key[:4], 200.0)
    assert [other.pinned(key, 199.0) for key in keys] == [key[:4] for key in keys]
    assert {other.pinned(key, 201.0) for key in keys} == {None}
    one.pin(keys[0], b"abcd", 300.0)
    assert other.pinned(keys[0], 299.0) == b"abcd"


def test_operators_word_reaches_all_and_is_taken_back(boards):
    one, other, server = boards
    assert dict(one.overrides()) == {}
    server.override("web", "spare")
    assert dict(one.overrides()) == dict(other.overrides()) == {"web": "spare"}
    server.override("web", None)
    assert dict(one.overrides()) == {}


def test_row_that_a_hostile_worker_has_written_harms_nobody(boards):
    one, _, server = boards
    one.read("paris")
    one._rows[:] = b"\xff" * len(one._rows)
    assert server.troubled() == []
    assert server.states() == {}
    with pytest.raises(TooManyWays):
        server.described("oslo")
    one._rows[:] = b"evil\0\x1b[2J".ljust(256, b"\xff") * (len(one._rows) // 256)
    server.troubled()
    one._rows[:] = bytes(len(one._rows))
    one.change("paris", lambda health: setattr(health, "cause", "\x1b[2J") or health.quarantine(1.0, "\x1b[2J"))
    assert server.troubled()[0]["cause"] == "?[2J"

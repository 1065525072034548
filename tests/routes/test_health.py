"""When a way falls and rises, and which member of a group is asked: I1-I5, I12, I14-I17, I22-I24 of the reports."""

from __future__ import annotations

import collections
import itertools
import random

import pytest

from rama_ebpf.core import Authority
from rama_ebpf.routes import (
    FAULTS,
    Choose,
    Chooser,
    Fault,
    Group,
    Health,
    HealthLimits,
    LocalBoard,
    Member,
    Parent,
    State,
    WayBook,
    direct_fault,
    http_fault,
    socks4_fault,
    socks5_fault,
)
from rama_ebpf.routes.health import QUARANTINE_SECONDS

LIMITS = HealthLimits(fall=3, rise=2, hold=10, longest=80)
PARENT = Parent("socks5", Authority.of("p.example", 1080))


def fallen(now: float = 100.0) -> Health:
    health = Health()
    assert [health.fail(now, LIMITS, "refused") for _ in range(3)] == [False, False, True]
    return health


def test_way_falls_after_failures_in_a_row_and_rises_after_successes_in_a_row():
    health = Health()
    for _ in range(5):  # a member that passes now and then: single failures do not take it down
        health.fail(1, LIMITS, "x")
        health.fail(1, LIMITS, "x")
        health.succeed(1, LIMITS, 0.1)
    assert health.usable()
    health = fallen()
    assert (health.state, health.usable(), health.triable(105)) == (State.DOWN, False, False)
    assert health.triable(112)
    assert health.claim(112, 5)
    assert not health.claim(112, 5)  # half-open: one at a time
    assert health.claim(118, 5)  # that one never came back
    assert not health.succeed(119, LIMITS, 0.1)
    assert (health.state, health.usable(), health.triable(119)) == (State.TRIAL, False, True)
    assert health.succeed(120, LIMITS, 0.1)
    assert (health.usable(), health.since, health.cause) == (True, 120, "")


def test_way_that_flaps_rests_twice_as_long_each_time():
    """I5, I14: hysteresis, and back to normal when it has been steady."""
    health, now, pauses = fallen(), 100.0, []
    for _ in range(5):
        pauses.append(health.hold)
        now = health.until
        assert health.claim(now, 5)
        health.fail(now, LIMITS, "refused")
    assert pauses == [10, 20, 40, 80, 80]
    health.claim(health.until, 5)
    health.succeed(now := health.until, LIMITS, 0.1)
    health.succeed(now, LIMITS, 0.1)
    for _ in range(3):
        health.fail(now + 1, LIMITS, "refused")
    assert health.hold == 80
    health = fallen()
    health.succeed(200, LIMITS, 0.1)
    health.succeed(200, LIMITS, 0.1)
    for _ in range(3):
        health.fail(400, LIMITS, "refused")
    assert health.hold == 10


def test_way_that_refuses_our_login_is_asked_again_only_after_a_long_time_or_by_an_operator():
    health = Health()
    assert health.quarantine(100, "407")
    assert not health.quarantine(101, "407")
    assert not health.triable(100 + QUARANTINE_SECONDS - 1)
    assert health.triable(101 + QUARANTINE_SECONDS)
    health.enable(200)
    assert (health.state, health.triable(200)) == (State.TRIAL, True)


def test_drained_way_is_not_even_tried():
    health = Health(drained=True)
    assert not health.usable()
    assert not health.triable(1e9)
    health = fallen()
    health.drained = True
    assert not health.claim(1e9, 1)


def test_table_of_blame_says_what_the_functions_do():
    assert {http_fault(status) for status in (403, 451, 502, 503, 504, 402)} == {Fault.TARGET}
    assert (http_fault(407), http_fault(429), http_fault(405), http_fault(500)) == (
        Fault.LOGIN,
        Fault.WAY,
        Fault.WAY,
        Fault.DOUBT,
    )
    assert [socks5_fault(rep).value for rep in range(1, 10)] == (
        ["doubt"] + ["target"] * 5 + ["unable"] * 2 + ["doubt"]
    )
    assert [socks4_fault(code) for code in (91, 92, 93, 5)] == [Fault.DOUBT, Fault.LOGIN, Fault.LOGIN, Fault.WAY]
    assert (direct_fault(101), direct_fault(110), direct_fault(111)) == (Fault.WAY, Fault.DOUBT, Fault.TARGET)
    assert {fault for _, _, fault in FAULTS} == set(Fault)
    assert [fault for fault in Fault if not fault.moves_on] == [Fault.TARGET]


def chooser(ways: dict, board: LocalBoard | None = None, secret: bytes = b"k" * 32) -> Chooser:
    return Chooser(WayBook(ways), board or LocalBoard(), secret, rng=random.Random(3).random)


def ways_of(count: int, **more) -> dict:
    names = [f"p{n}" for n in range(count)]
    return dict.fromkeys(names, PARENT) | {"g": Group((tuple(names),), **more)}


def down(board: LocalBoard, name: str, now: float = 100.0) -> None:
    for _ in range(3):
        board.change(name, lambda health: health.fail(now, LIMITS, "refused"))


def names(members: list[Member]) -> list[str]:
    return [member.name for member in members]


def test_member_of_unknown_health_is_asked_and_an_empty_tier_is_never_direct():
    """I1, I2: nothing is known at the start; and with all down there is nobody to ask, which refuses."""
    board = LocalBoard()
    some = chooser(ways_of(2), board)
    assert names(some.order("g", b"", 0)) == ["p0", "p1"]
    down(board, "p0")
    down(board, "p1")
    assert some.order("g", b"", 101) == []
    assert some.order("g", b"", 112) == [Member("p0", free=False), Member("p1", free=False)]


def test_second_tier_is_asked_while_no_member_of_the_first_is_well():
    board = LocalBoard()
    some = chooser({"a": PARENT, "b": PARENT, "c": PARENT, "g": Group((("a", "b"), ("c",)))}, board)
    assert names(some.order("g", b"", 0)) == ["a", "b", "c"]
    down(board, "a")
    assert names(some.order("g", b"", 101)) == ["b", "c"]
    assert some.order("g", b"", 120)[0] == Member("a", free=False)  # tried in its own place, by one


def test_health_of_a_group_follows_from_its_members():
    """I4: an inner group is skipped for as long as none of its members is well, and no longer."""
    board = LocalBoard()
    ways = {"a": PARENT, "b": PARENT, "c": PARENT, "in": Group((("a", "b"),)), "g": Group((("in",), ("c",)))}
    some = chooser(ways, board)
    down(board, "a")
    assert names(some.order("g", b"", 101)) == ["b", "c"]
    down(board, "b")
    assert names(some.order("g", b"", 101)) == ["c"]


def test_hash_moves_only_the_keys_of_the_member_that_goes_and_they_come_back():
    """I22, and must-show 3: of 100 members one goes."""
    board = LocalBoard()
    some = chooser(ways_of(100, choose=Choose.HASH), board)
    keys = [f"user{n}".encode() for n in range(600)]
    before = {key: some.order("g", key, 0)[0].name for key in keys}
    spread = collections.Counter(before.values())
    assert len(spread) > 90
    assert max(spread.values()) < 30
    second = {key: some.order("g", key, 0)[1].name for key in keys}
    down(board, "p7")
    after = {key: some.order("g", key, 101)[0].name for key in keys}
    assert all(after[key] == (second[key] if before[key] == "p7" else before[key]) for key in keys)
    board.change("p7", lambda health: health.succeed(120, LIMITS, 0.1))
    board.change("p7", lambda health: health.succeed(120, LIMITS, 0.1))
    assert {key: some.order("g", key, 121)[0].name for key in keys} == before


def test_hash_is_by_name_and_key_not_by_place_and_differs_by_secret():
    """I23: another order of the same members, another process: the same choice; who has no secret cannot tell it."""
    ways = ways_of(20, choose=Choose.HASH)
    shuffled = ways | {"g": Group((tuple(reversed(ways["g"].members)),), choose=Choose.HASH)}
    keys = [f"user{n}".encode() for n in range(200)]
    one, other, foreign = chooser(ways), chooser(shuffled), chooser(ways, secret=b"x" * 32)
    assert [one.order("g", k, 0)[0] for k in keys] == [other.order("g", k, 0)[0] for k in keys]
    assert sum(one.order("g", k, 0)[0] == foreign.order("g", k, 0)[0] for k in keys) < 40


def test_load_of_the_hash_is_bounded():
    board = LocalBoard()
    some = chooser(ways_of(10, choose=Choose.HASH), board)
    for _ in range(1000):  # one key, all the time
        board.enter(some.order("g", b"hot", 0)[0].name)
    loads = sorted(board.live(f"p{n}") for n in range(10))
    assert loads[-1] <= 1.25 * 1000 / 10 + 2


def test_least_connections_and_weights():
    board = LocalBoard()
    some = chooser(ways_of(3, choose=Choose.LEAST, weights={"p0": 2}), board)
    for _ in range(400):
        board.enter(some.order("g", b"", 0)[0].name)
    assert [board.live(f"p{n}") for n in range(3)] == [200, 100, 100]
    some = chooser(ways_of(3, choose=Choose.WEIGHT, weights={"p0": 8}))
    first = collections.Counter(some.order("g", b"", 0)[0].name for _ in range(2000))
    assert 1450 < first["p0"] < 1750


def test_quickest_of_late_is_first():
    board = LocalBoard()
    some = chooser(ways_of(3, choose=Choose.LATENCY), board)
    for name, seconds in (("p0", 0.3), ("p1", 0.1), ("p2", 0.2)):
        board.change(name, lambda health, seconds=seconds: health.succeed(1, LIMITS, seconds))
    assert names(some.order("g", b"", 2)) == ["p1", "p2", "p0"]


def test_pin_outlasts_new_members_and_a_fall_and_ends_with_its_life():
    board = LocalBoard()
    few, more = ways_of(3, choose=Choose.HASH, sticky=60), ways_of(30, choose=Choose.HASH, sticky=60)
    one = chooser(few, board)
    keys = [f"user{n}".encode() for n in range(50)]
    before = {}
    for key in keys:
        before[key] = one.order("g", key, 0)[0].name
        one.chosen("g", before[key], key, 0)
    grown = chooser(more, board)
    assert {key: grown.order("g", key, 59)[0].name for key in keys} == before
    down(board, "p1", 30)
    for key in keys:
        here = grown.order("g", key, 31)[0].name
        assert here != "p1"
        grown.chosen("g", here, key, 31)
    board.change("p1", lambda health: health.enable(40) or health.succeed(40, LIMITS, 0.1))
    board.change("p1", lambda health: health.succeed(40, LIMITS, 0.1))
    assert {key: grown.order("g", key, 59)[0].name for key in keys} == before
    assert {key: grown.order("g", key, 61)[0].name for key in keys} != before


@pytest.mark.parametrize("choose", list(Choose))
def test_every_member_is_somewhere_in_the_order_whatever_is_preferred(choose):
    some = chooser(ways_of(5, choose=choose))
    for key in itertools.islice(map(str, itertools.count()), 20):
        assert sorted(names(some.order("g", key.encode(), 0))) == [f"p{n}" for n in range(5)]

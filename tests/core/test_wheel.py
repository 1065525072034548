from __future__ import annotations

import random

from rama_ebpf.core.wheel import TimerWheel


def test_nothing_is_due_early_and_all_is_due_within_one_slot() -> None:
    rng = random.Random(5)
    wheel: TimerWheel[int] = TimerWheel(0.1)
    when = {item: rng.uniform(1000, 1020) for item in range(2000)}
    for item in when:
        wheel.add(item, when[item])
    seen = {}
    while (now := wheel.next_due()) is not None:
        for item in wheel.take_due(now):
            seen[item] = now
    assert seen.keys() == when.keys()
    assert all(when[item] <= seen[item] <= when[item] + 0.1001 for item in when)


def test_what_was_removed_never_comes_due() -> None:
    wheel: TimerWheel[str] = TimerWheel(1)
    kept, dropped = wheel.add("kept", 5), wheel.add("dropped", 5)
    wheel.remove("dropped", dropped)
    assert wheel.take_due(100) == ["kept"]
    wheel.remove("kept", kept)
    assert wheel.next_due() is None

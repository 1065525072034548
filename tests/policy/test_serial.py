"""Commands that are stopped wherever they are, and continued, change the policy one after the other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .serial import pinned_instance, run_round

pytestmark = [pytest.mark.root, pytest.mark.ebpf]


def test_writers_that_are_stopped_and_continued_give_some_serial_order(instance: str, tmp_path: Path) -> None:
    pick = random.Random(1)
    with pinned_instance(instance) as place:
        changes = [run_round(place, pick, tmp_path, writers=20, restart=n % 2 == 1) for n in range(6)]
    assert min(changes) > 5

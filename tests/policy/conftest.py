"""The pinned maps of a gate without its programs: all that the commands that change a policy need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rama_ebpf.kernel import bpffs
from rama_ebpf.kernel.gate_maps import GateMaps, MapSizes
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.ban_log import BanLog
from rama_ebpf.policy.ban_record import read_ban
from rama_ebpf.policy.rule import Ban


@pytest.fixture
def pinned(instance: str) -> Iterator[Instance]:
    """An instance with room for 4,095 rules and 64 bans."""
    place = Instance(instance)
    bpffs.ensure_mounted()
    place.pin_dir.mkdir(parents=True, mode=0o700)
    GateMaps.create(place.pin_dir, MapSizes(rules=4096, bans=64, buckets=4096)).close()
    yield place
    bpffs.remove_tree(place.pin_root)


def bans_in(log: BanLog) -> list[Ban]:
    """The bans that are in force by what is on disk."""
    return [read_ban(key, value) for block in log.read().blocks() for key, value in block.rows()]

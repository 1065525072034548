"""One gate by each of its ways: pinned maps, a server's socket, and in the process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rama_ebpf import SyncGate
from rama_ebpf.kernel import bpffs
from rama_ebpf.kernel.gate_maps import GateMaps, MapSizes
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.local import LocalStore


@pytest.fixture
def pinned(instance: str) -> Iterator[Instance]:
    """An instance that is loaded, with the usual sizes, and that nobody serves."""
    place = Instance(instance)
    bpffs.ensure_mounted()
    place.pin_dir.mkdir(parents=True, mode=0o700)
    GateMaps.create(place.pin_dir, MapSizes()).close()
    yield place
    bpffs.remove_tree(place.pin_root)


@pytest.fixture(params=["local", pytest.param("pins", marks=[pytest.mark.root, pytest.mark.ebpf])])
def gate(request: pytest.FixtureRequest, instance: str) -> Iterator[SyncGate]:
    """A gate without a server."""
    if request.param == "local":
        with SyncGate(instance, store=LocalStore()) as made:
            yield made
    else:
        with SyncGate(request.getfixturevalue("pinned").name) as made:
            yield made

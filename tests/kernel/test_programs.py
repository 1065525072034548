"""Every program that is in bpf/ loads on this kernel, with room to spare."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from rama_ebpf import loader
from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.instance import Instance

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

# The verifier's limit is 1,000,000. Kernels differ by a factor: what took 218,000 on 6.18 did not load on 6.1.
ROOM = 150_000

_CONTEXTS = "__sk_buff|xdp_md|bpf_sk_lookup|bpf_sock_ops|bpf_sock_addr"


def _declared() -> set[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(abi.source_dir().glob("*.c")))
    return set(re.findall(rf"^int (\w+)\(struct (?:{_CONTEXTS}) \*", text, flags=re.M))


def test_every_program_passes_the_verifier_with_room_to_spare(
    instance: str, record_property: Callable[[str, object], None]
) -> None:
    place = Instance(instance)
    place.run_dir.mkdir(parents=True)
    gate = loader.load(place, xdp=True)
    try:
        assert set(gate.programs) == _declared()
        walked = {name: bpf.prog_info(fd).verified_insns for name, fd in gate.programs.items()}
    finally:
        gate.close()
    for name, count in walked.items():
        record_property(name, count)
    assert all(0 < count < ROOM for count in walked.values()), walked

"""Every program that is in bpf/ loads on this kernel, with room to spare."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable

import pytest

from rama_ebpf import loader
from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.gate_maps import GateMaps
from rama_ebpf.kernel.host_guard import GUARD_PROGRAM, HostGuard
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.kernel.splice import SpliceMaps
from rama_ebpf.kernel.wire import WireMaps

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

# The verifier's limit is 1,000,000, and kernels differ by a factor: 6.18 walks twice as many as 6.1, or the reverse.
ROOM = 300_000

_CONTEXTS = "__sk_buff|xdp_md|bpf_sk_lookup|bpf_sock_ops|bpf_sock_addr|bpf_sockopt|bpf_sock"


def _declared() -> set[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(abi.source_dir().glob("*.c")))
    return set(re.findall(rf"^int (\w+)\(struct (?:{_CONTEXTS}) \*", text, flags=re.M))


def _relay() -> dict[str, int]:
    """What the verifier walked of the relay's program, of which only the sockmap holds a reference."""
    maps = SpliceMaps.load(1, 16)
    try:
        command = ["bpftool", "--json", "prog", "show", "name", "relay_verdict"]
        shown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        newest = max(row["id"] for row in (shown if isinstance(shown, list) else [shown]))
        fd = bpf.prog_by_id(newest)
        try:
            return {"relay_verdict": bpf.prog_info(fd).verified_insns}
        finally:
            os.close(fd)
    finally:
        maps.close()


def _wire() -> dict[str, int]:
    maps = WireMaps.load(16)
    try:
        return {name: bpf.prog_info(fd).verified_insns for name, fd in maps.programs.items()}
    finally:
        maps.close()


def _guard(maps: GateMaps) -> dict[str, int]:
    guard = HostGuard(maps)
    try:
        return {GUARD_PROGRAM.name: guard.verified_insns}
    finally:
        guard.close()


def test_every_program_passes_the_verifier_with_room_to_spare(
    instance: str, record_property: Callable[[str, object], None]
) -> None:
    place = Instance(instance)
    place.run_dir.mkdir(parents=True)
    gate = loader.load(place, xdp=True, syn_cookies=True)
    try:
        walked = {name: bpf.prog_info(fd).verified_insns for name, fd in gate.programs.items()}
        walked |= _guard(gate.maps) | _relay() | _wire()
    finally:
        gate.close()
    for name, count in walked.items():
        record_property(name, count)
    assert set(walked) == _declared()
    assert all(0 < count < ROOM for count in walked.values()), walked

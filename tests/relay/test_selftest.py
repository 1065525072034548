from __future__ import annotations

from pathlib import Path

import pytest

from rama_ebpf.kernel.abi import source_dir
from rama_ebpf.kernel.splice import SpliceMaps
from rama_ebpf.relay.selftest import known_bad, self_test
from tests.lab import PATIENCE

pytestmark = [pytest.mark.root, pytest.mark.ebpf]


async def test_this_kernel_passes(splice_maps: SpliceMaps) -> None:
    assert (await self_test(splice_maps.fds, timeout=100 * PATIENCE)).refusal == ""


@pytest.mark.parametrize(
    ("release", "bad"),
    [
        ("5.15.0-91-generic", True),
        ("6.1.0-18-amd64", False),
        ("6.5.13", True),
        ("6.6.94", False),
        ("6.8.0-40-generic", True),
        ("6.12.33+deb13-amd64", True),
        ("6.12.34+deb13-amd64", False),
        ("6.14.11", True),
        ("6.18.44", False),
        ("6.18-rc1", False),
        ("mainline", True),
    ],
)
async def test_bad_kernels_are_refused_by_name(splice_maps: SpliceMaps, release: str, bad: bool) -> None:
    assert bool(known_bad(release)) is bad
    if bad:
        assert release in (await self_test(splice_maps.fds, release)).refusal


FAULTS = {
    "bulk": ("duplicate = d->next - seq;", "duplicate = d->next - seq + (d->redirected > 10000000);"),
    "half-close": ("return SK_DROP; /* a bare FIN", "return relayed.sk_redirect_hash(skb, &sink, 0); /* a bare FIN"),
    "stalled reader": ("if (d->redirected <= d->cleared || has_credit(d, sink, 0)) {", "if (1) {"),
    "overlapping segments": ("duplicate = d->next - seq;", "duplicate = 0;"),
}


@pytest.mark.parametrize("check", FAULTS)
async def test_each_check_finds_its_fault(tmp_path: Path, check: str) -> None:
    """The program with one fault each: the self-test says which of its parts was not right."""
    right, wrong = FAULTS[check]
    for source in ("splice.c", "splice.h"):
        text = (source_dir() / source).read_text()
        assert source != "splice.c" or text.count(right) == 1
        (tmp_path / source).write_text(text.replace(right, wrong))
    maps = SpliceMaps.load(shares=1, tunnels=16, sources=tmp_path)
    try:
        refusal = (await self_test(maps.fds)).refusal
    finally:
        maps.close()
    assert refusal.startswith("the self-test failed: "), refusal
    assert check in refusal

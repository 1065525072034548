"""Every Python block of the pages for engineers runs, imports included; what is to be run by its reader is run."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.kernel import bpffs
from rama_ebpf.kernel.gate_maps import GateMaps, MapSizes
from rama_ebpf.kernel.instance import Instance

from .lab import Lab

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/index.md", "docs/gate.md", "docs/howto.md", "docs/lab.md")
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S), 1)
]


@pytest.mark.root
@pytest.mark.ebpf
@pytest.mark.parametrize("block", BLOCKS)
def test_block_of_the_documentation_runs(
    block: str, instance: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Instance(instance)
    bpffs.ensure_mounted()
    place.pin_dir.mkdir(parents=True, mode=0o700)
    GateMaps.create(place.pin_dir, MapSizes(rules=4096, bans=64, buckets=4096)).close()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAMA_EBPF_INSTANCE", instance)
    (tmp_path / "users.txt").touch()
    code = compile(block.replace('"docs"', repr(instance)), "block", "exec", dont_inherit=True)
    names: dict[str, Any] = {"__name__": "block"}

    def run() -> None:
        exec(code, names)  # as a reader would
        main = names.get("main")
        if main is not None:
            work: Coroutine[object, object, object] = main()
            asyncio.run(work)

    lab.host("reader").call(run)


def test_pages_have_blocks() -> None:
    assert len(BLOCKS) >= 10

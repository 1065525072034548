"""Every configuration of docs/routes.md is good, and its table of blame is the one that is used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rama_ebpf.config import load_config
from rama_ebpf.routes import FAULTS

TEXT = (Path(__file__).parent.parent.parent / "docs/routes.md").read_text()
EXAMPLES = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
HEAD = '[listeners.front]\naddress = "127.0.0.1:1080"\nstack = "proxy"\n[stacks.proxy]\nservice = "mixed"\n'


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_configuration_of_the_page_is_good(tmp_path: Path, number: int) -> None:
    path = tmp_path / "rama.toml"
    path.write_text(HEAD + EXAMPLES[number])
    assert load_config(path).routes


def test_there_are_ten_of_them_and_one_for_the_shape() -> None:
    assert len(EXAMPLES) == 11


def test_table_of_blame_is_the_one_that_is_used() -> None:
    rows = "\n".join(f"| {where} | {what} | `{fault.value}` |" for where, what, fault in FAULTS)
    assert rows in TEXT

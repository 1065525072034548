"""The numbers that the kernel programs and the Python code agree on."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rama_ebpf.kernel import abi
from rama_ebpf.kernel.header import Header, HeaderMismatch
from rama_ebpf.policy import compiler, intervals
from rama_ebpf.policy.prefixes import Prefixes
from rama_ebpf.policy.rule import PRECEDENCE, RUNTIME, Action, Rule, Stage


def test_actions_and_stages_are_those_of_the_header() -> None:
    constant = abi.constants()
    for action in Action:
        assert constant[f"ACTION_{action.name}"] == action
    for stage in Stage:
        assert constant[f"STAGE_{stage.name}"] == stage


def test_chains_are_laid_out_as_in_the_header() -> None:
    constant = abi.constants()
    assert constant["MAX_CHAIN"] == compiler.MAX_CHAIN
    assert constant["MAX_CHAIN_ITEMS"] == intervals.MAX_VALUE + 1
    assert constant["MAX_SLOTS"] == intervals.MAX_SLOTS
    assert constant["PAGE_BYTES"] == intervals.PAGE
    for layout in intervals.Layout:
        assert constant[f"LAYOUT_{layout.name}"] == layout


def test_a_rule_s_order_is_made_of_the_bits_of_the_header() -> None:
    constant = abi.constants()
    rule = Rule("r", Prefixes.of(["192.0.2.0/24"]), Action.DROP, port=80, origin=RUNTIME)
    highest = PRECEDENCE[Action.DROP] * constant["ORDER_PRECEDENCE"]
    assert rule.order == constant["ORDER_PORT"] | highest | constant["ORDER_RUNTIME"]
    assert rule.order < 1 << constant["RANK_LENGTH_SHIFT"]


_TEXT = (abi.source_dir() / "policy.h").read_text(encoding="utf-8")
# The packed structures that userspace has a layout of.
_SHARED = [name for name in Header(_TEXT).structures if isinstance(getattr(abi, name.upper(), None), struct.Struct)]


def _swapped(structure: str) -> str:
    """The header with the structure's first two members in the other order; every size stays what it is."""
    found = re.search(rf"^struct {structure} \{{\n(.*?)^\}}", _TEXT, flags=re.S | re.M)
    assert found is not None
    declarations = re.sub(r"/\*.*?\*/", "", found[1], flags=re.S).split(";")
    declarations[:2] = reversed(declarations[:2])
    return _TEXT[: found.start(1)] + ";".join(declarations) + _TEXT[found.end(1) :]


def test_every_structure_in_a_map_is_shared_by_name() -> None:
    assert len(_SHARED) == 32


@pytest.mark.parametrize("structure", _SHARED)
def test_swapped_members_of_a_structure_are_refused(structure: str, tmp_path: Path) -> None:
    """Also where both have one type, so that no size changes. Nothing starts with such a header."""
    package = tmp_path / "rama_ebpf"
    (package / "kernel").mkdir(parents=True)
    for directory in (package, package / "kernel"):
        (directory / "__init__.py").touch()
    for name in ("abi", "header"):
        (package / "kernel" / f"{name}.py").write_bytes(Path(abi.__file__).with_name(f"{name}.py").read_bytes())
    (package / "_bpf").mkdir()
    importing = [sys.executable, "-c", "import rama_ebpf.kernel.abi"]
    (package / "_bpf" / "policy.h").write_text(_TEXT, encoding="utf-8")
    assert subprocess.run(importing, cwd=package.parent, capture_output=True).returncode == 0
    (package / "_bpf" / "policy.h").write_text(_swapped(structure), encoding="utf-8")
    done = subprocess.run(importing, cwd=package.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"HeaderMismatch: struct {structure} has " in done.stderr


def test_sizes_are_those_that_the_compiler_asserts() -> None:
    asserted = re.findall(r"_Static_assert\(sizeof\(struct (\w+)\) == (\d+)", _TEXT)
    ours = {name: getattr(abi, name.upper()).size for name, _ in asserted if name in _SHARED}
    assert ours == {name: int(size) for name, size in asserted if name in _SHARED}


def test_unknown_structure_is_refused() -> None:
    with pytest.raises(HeaderMismatch, match="no struct none"):
        Header(_TEXT).layout("none")

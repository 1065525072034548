from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .conftest import EXAMPLES


def test_every_example_has_a_test_of_its_name() -> None:
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    examples = {path.stem for suffix in ("py", "toml") for path in EXAMPLES.glob(f"*.{suffix}")}
    assert examples - {"rama"} <= tests  # rama.toml is that of test_configuration


@pytest.mark.parametrize(
    ("name", "most"), [("sqlite_users", 30), ("rewrite_json", 20), ("sni_router", 15), ("shield", 8)]
)
def test_what_a_user_writes_is_short(name: str, most: int) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    docstring = ast.parse(source).body[0]
    assert docstring.end_lineno is not None
    code = source.splitlines()[docstring.end_lineno :]
    assert len([line for line in code if line.strip()]) <= most

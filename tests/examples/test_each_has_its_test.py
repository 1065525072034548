from __future__ import annotations

from pathlib import Path

from .conftest import EXAMPLES


def test_every_example_has_a_test_of_its_name() -> None:
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    examples = {path.stem for suffix in ("py", "toml") for path in EXAMPLES.glob(f"*.{suffix}")}
    assert examples - {"rama"} <= tests  # rama.toml is that of test_configuration

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rama_ebpf.config.positions import Path, key_lines
from rama_ebpf.config.show import to_toml

TEXT = '''\
title = "x" # not a [table]
"quoted key".'literal' = 1

[server]   # comment
a = [
  1, # [not.a.table]
  "]", { b = 2, "c d" = [3,
    4] },
]
text = """
[looks.like.a.table]
ends with quotes: \\"""\\
"""
lit = \'\'\'
a = 1\'\'\'
date = 1979-05-27 07:32:00
[[rules]]
name = "one"
[rules.sub]
x.y = true
[[rules]]
name = "two"
[[rules.deep]]
z = {}
'''


def test_every_key_has_its_line() -> None:
    lines = key_lines(TEXT)
    for path, line in {
        ("title",): 1,
        ("quoted key", "literal"): 2,
        ("server",): 4,
        ("server", "a"): 5,
        ("server", "a", 0): 6,
        ("server", "a", 1): 7,
        ("server", "a", 2, "b"): 7,
        ("server", "a", 2, "c d", 1): 8,
        ("server", "text"): 10,
        ("server", "lit"): 14,
        ("server", "date"): 16,
        ("rules", 0): 17,
        ("rules", 0, "name"): 18,
        ("rules", 0, "sub", "x", "y"): 20,
        ("rules", 1): 21,
        ("rules", 1, "name"): 22,
        ("rules", 1, "deep", 0, "z"): 24,
    }.items():
        assert lines[path] == line, path


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every path in plain values."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths(item, (*path, index))


def test_no_path_is_missed() -> None:
    assert set(paths(tomllib.loads(TEXT))) <= key_lines(TEXT).keys()


KEYS = st.text(min_size=1, max_size=8)
SCALARS = st.booleans() | st.integers(-10, 10**9) | st.text(max_size=20)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_is_written_is_read_back_and_found(values: dict[str, Any]) -> None:
    text = to_toml(values)
    assert tomllib.loads(text) == values, text
    assert set(paths(values)) <= key_lines(text).keys()


@pytest.mark.parametrize("key", ["", "a.b", 'quo"te', "ünï", "back\\slash", "new\nline", "\x7f"])
def test_odd_keys(key: str) -> None:
    text = f"{json.dumps(key).replace(chr(127), chr(92) + 'u007f')} = 1\n"
    assert key_lines(text) == {(key,): 1}

"""What other programs get from a command: errors as JSON, and no complaint when they stop reading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("rama-ebpf")


def run(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *args], text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("args", "code"),
    [(("block", "nonsense"), 2), (("flows",), 3), (("test", "198.18.0.1", "--instance", "no such"), 2)],
)
def test_error_is_json_where_json_is_asked_for(args: tuple[str, ...], code: int) -> None:
    result = run(*args, "--json", *(() if "--instance" in args else ("--instance", "nobody")), capture_output=True)
    assert result.returncode == code
    error = json.loads(result.stdout)
    assert error["exit"] == code
    assert error["error"] in result.stderr


def test_who_stops_reading_is_told_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    result = run("doctor", "--instance", "nobody", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")

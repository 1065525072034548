"""What a user's type checker sees of the package, in a project of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def mypy(name: str, directory: Path) -> str:
    shutil.copy(HERE / name, directory)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", name]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300).stdout


def test_programs_of_users_have_types_from_end_to_end(tmp_path: Path) -> None:
    assert mypy("programs.py", tmp_path) == ""


def test_each_mistake_is_reported_on_its_line_and_nothing_else(tmp_path: Path) -> None:
    lines = (HERE / "mistakes.py").read_text(encoding="utf-8").splitlines()
    wrong = {number for number, line in enumerate(lines, start=1) if "# mistake" in line}
    report = mypy("mistakes.py", tmp_path)
    reported = {int(line.split(":")[1]) for line in report.splitlines() if ": error:" in line}
    assert wrong == reported, report

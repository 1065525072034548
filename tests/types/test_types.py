"""What a user's type checker sees of the package, in a project of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def mypy(name: str, directory: Path) -> str:
    shutil.copy(HERE / name, directory)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", name]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300).stdout


def pyright(name: str, directory: Path) -> dict[int, str]:
    """What the type checker of editors says, by line."""
    shutil.copy(HERE / name, directory)
    (directory / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "venvPath": "/nowhere"}))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, name]
    report = json.loads(subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300).stdout)
    errors = (row for row in report["generalDiagnostics"] if row["severity"] == "error")
    return {row["range"]["start"]["line"] + 1: row["message"] for row in errors}


def test_second_type_checker_sees_the_same(tmp_path: Path) -> None:
    assert pyright("programs.py", tmp_path) == {}
    lines = (HERE / "mistakes.py").read_text(encoding="utf-8").splitlines()
    wrong = {number for number, line in enumerate(lines, start=1) if "# mistake" in line}
    found = pyright("mistakes.py", tmp_path)
    assert wrong == set(found), found


def test_programs_of_users_have_types_from_end_to_end(tmp_path: Path) -> None:
    assert mypy("programs.py", tmp_path) == ""


def test_each_mistake_is_reported_on_its_line_and_nothing_else(tmp_path: Path) -> None:
    lines = (HERE / "mistakes.py").read_text(encoding="utf-8").splitlines()
    wrong = {number for number, line in enumerate(lines, start=1) if "# mistake" in line}
    report = mypy("mistakes.py", tmp_path)
    reported = {int(line.split(":")[1]) for line in report.splitlines() if ": error:" in line}
    assert wrong == reported, report

"""The unit for systemd is one that systemd takes, and the server works with no more than it leaves to it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from rama_ebpf.cli import _parser

from ..proxy import ProxyProcess

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "packaging/systemd/rama-ebpf.service"


def settings(name: str) -> list[str]:
    """The values of a setting, in order."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), flags=re.M)


def test_systemd_has_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    # Where this suite has the command, and the unit's users have it in /usr/bin.
    unit.write_text(UNIT.read_text().replace("/usr/bin/rama-ebpf", ProxyProcess.COMMAND))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_each_line_of_the_unit_is_explained() -> None:
    lines = UNIT.read_text().splitlines()
    service = lines[lines.index("[Service]") : lines.index("[Install]")]
    names = [line.partition("=")[0] for line in service]
    unexplained = [
        line
        for before, name, line in zip(names, names[1:], service[1:], strict=False)
        if "=" in line and not line.startswith("#") and not before.startswith("#") and before != name
    ]
    assert unexplained == []


def test_the_units_command_is_one_that_is_understood() -> None:
    (line,) = settings("ExecStart")
    command, *words = line.split()
    assert command == "/usr/bin/rama-ebpf"
    args = _parser(words).parse_args(words)
    assert str(args.config) == "/etc/rama-ebpf/rama.toml"

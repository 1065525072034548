from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rama_ebpf.core import Credentials, User
from rama_ebpf.layers.auth import PasswordFile

COMMAND = str(Path(sys.executable).with_name("rama-ebpf"))


def run(*args: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *args], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=60)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "rama.toml").write_text(
        '[listeners.a]\naddress = "127.0.0.1:1080"\nstack = "s"\n[stacks.s]\nservice = "mixed"\n'
    )
    (tmp_path / "bad.toml").write_text('[listeners.a]\naddress = "here"\nstack = "s"\n')
    return tmp_path


def test_check_says_what_is_good(directory: Path) -> None:
    done = run("check", cwd=directory)
    assert (done.returncode, done.stdout) == (0, "rama.toml: good: a on 127.0.0.1:1080\n")


def test_check_tells_mistakes_to_people_and_programs(directory: Path) -> None:
    done = run("check", "bad.toml", cwd=directory)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("bad.toml:1: stacks: this setting is needed")
    assert done.stderr.splitlines()[1].startswith('bad.toml:2: listeners.a.address: "here": write for example')
    told = json.loads(run("check", "bad.toml", "--json", cwd=directory).stdout)
    assert [(row["line"], row["setting"]) for row in told["mistakes"]] == [(1, "stacks"), (2, "listeners.a.address")]


def test_config_show_fills_in_the_defaults(directory: Path) -> None:
    values = tomllib.loads(run("config", "show", cwd=directory).stdout)
    assert values["stacks"]["s"]["connect"]["timeout"] == "10s"
    assert json.loads(run("config", "show", "--json", cwd=directory).stdout) == values
    assert run("config", "show", "bad.toml", cwd=directory).returncode == 2


async def test_passwd_makes_a_line_that_authenticates(directory: Path) -> None:
    done = run("passwd", "tom", cwd=directory, stdin="sécret\n")
    assert done.returncode == 0
    (directory / "users").write_text(done.stdout)
    assert await PasswordFile(directory / "users")(Credentials("tom", "sécret")) == User("tom")


@pytest.mark.parametrize(("name", "stdin"), [("a:b", "x\n"), ("#x", "x\n"), ("tom", "\n"), ("tom", "")])
def test_passwd_refuses_what_cannot_be_used(directory: Path, name: str, stdin: str) -> None:
    done = run("passwd", name, cwd=directory, stdin=stdin)
    assert (done.returncode, done.stdout) == (2, "")

"""The files that an operator edits or keeps: byte order marks, bounds, and who else may read or change them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rama_ebpf.config.load import ConfigError, load_config
from rama_ebpf.config.policy import load_policy

COMMAND = str(Path(sys.executable).with_name("rama-ebpf"))
USER = "tom:$scrypt$ln=4,r=8,p=1$AAAAAAAAAAAAAAAAAAAAAA$" + "A" * 43 + "\n"
PLAIN = (
    '[listeners.a]\naddress = "127.0.0.1:1080"\nstack = "s"\n[stacks.s]\nservice = { socks5 = { users = "users" } }\n'
)
MARK = b"\xef\xbb\xbf"


def run(*args: str, cwd: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *args], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=60)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "rama.toml").write_text(PLAIN)
    (tmp_path / "users").write_text(USER)
    (tmp_path / "users").chmod(0o600)
    return tmp_path


def test_check_names_each_file_that_others_may_read_or_change(directory: Path) -> None:
    assert run("check", cwd=directory).stderr == ""
    (directory / "users").chmod(0o644)
    (directory / "rama.toml").chmod(0o666)
    done = run("check", cwd=directory)
    assert done.returncode == 0
    assert done.stdout == "rama.toml: good: a on 127.0.0.1:1080\n"
    assert done.stderr.splitlines() == [
        "warning: rama.toml: mode 0666: everybody may change it: chmod 0600",
        f"warning: {directory}/users: mode 0644: everybody may read it: "
        "chmod 0640 with the workers' group, or 0600 (then SIGHUP has it read again)",
    ]
    assert len(json.loads(run("check", "--json", cwd=directory).stdout)["warnings"]) == 2
    (directory / "users").chmod(0o640)
    (directory / "rama.toml").chmod(0o644)
    assert run("check", cwd=directory).stderr == ""


def test_a_configuration_with_a_proxys_password_is_for_its_owner(directory: Path) -> None:
    text = PLAIN + 'connect = { via = ["socks5://tom:secret@proxy.test:1080"] }\n'
    (directory / "rama.toml").write_text(text)
    (directory / "rama.toml").chmod(0o644)
    assert "rama.toml: mode 0644: everybody may read it" in run("check", cwd=directory).stderr


def test_a_directory_in_which_everybody_may_write_is_said(directory: Path) -> None:
    directory.chmod(0o777)
    assert "everybody may replace it" in run("check", cwd=directory).stderr


def test_check_says_that_keys_are_readable_wherever_they_are_named(directory: Path) -> None:
    assert run("ca", "create", cwd=directory).returncode == 0
    assert stat.S_IMODE((directory / "ca.key").stat().st_mode) == 0o600
    (directory / "ca.key").chmod(0o644)
    layer = 'layers = [{ tls-tunnel = { intercept = { ca = "ca.pem", ca_key = "ca.key" } } }]\n'
    (directory / "rama.toml").write_text(PLAIN + layer)
    assert f"{directory}/ca.key: mode 0644" in run("check", cwd=directory).stderr


def test_a_byte_order_mark_is_passed_over_in_every_text_file(directory: Path) -> None:
    for name in ("rama.toml", "users"):
        (directory / name).write_bytes(MARK + (directory / name).read_bytes())
    assert run("check", cwd=directory).returncode == 0
    policy = directory / "policy.toml"
    policy.write_bytes(MARK + b'default = "drop"\n')
    assert load_policy(policy).default == "drop"


def test_a_byte_order_mark_in_a_pem_file_is_a_mistake_with_a_remedy(directory: Path) -> None:
    assert run("ca", "create", cwd=directory).returncode == 0
    layer = 'layers = [{ tls-tunnel = { intercept = { ca = "ca.pem", ca_key = "ca.key" } } }]\n'
    (directory / "rama.toml").write_text(PLAIN + layer)
    assert run("check", cwd=directory).returncode == 0
    (directory / "ca.pem").write_bytes(MARK + (directory / "ca.pem").read_bytes())
    done = run("check", cwd=directory)
    assert done.returncode == 2
    assert f"{directory}/ca.pem: begins with a byte order mark" in done.stderr


def test_a_path_that_is_left_to_workers_has_to_be_there(directory: Path) -> None:
    text = PLAIN + '[sandbox]\nread = ["."]\nwrite = ["state"]\n'
    (directory / "rama.toml").write_text(text)
    done = run("check", cwd=directory)
    assert done.returncode == 2
    assert "sandbox.write[0]" in done.stderr
    (directory / "state").mkdir()
    assert run("check", cwd=directory).returncode == 0
    for option in ("--sandbox-read", "--sandbox-write"):
        done = run("run", option, "nowhere", cwd=directory)
        assert (done.returncode, done.stderr) == (
            2,
            f"rama-ebpf run: {option} nowhere: there is no such file or directory\n",
        )


def test_a_configuration_is_a_regular_file_of_bounded_size_or_standard_input(directory: Path) -> None:
    os.mkfifo(directory / "fifo.toml")
    (directory / "huge.toml").touch()
    os.truncate(directory / "huge.toml", 1 << 40)
    for name, why in (("fifo.toml", "not a regular file"), ("huge.toml", "larger than 64 MiB")):
        with pytest.raises(ConfigError, match=why):
            load_config(directory / name)
    done = run("check", "/dev/stdin", cwd=directory, stdin=PLAIN.replace('"users"', f'"{directory}/users"'))
    assert done.returncode == 0, done.stderr

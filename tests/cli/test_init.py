"""``init`` leaves a configuration that is good and serves, or nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rama_ebpf.cli import main
from rama_ebpf.cli.init import JOBS
from rama_ebpf.config.load import load_config

from ..conftest import StartProxy
from ..lab import Lab

SERVICE = """
import socketserver
class Hello(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"hello")
server = socketserver.TCPServer(("127.0.0.1", 8080), Hello)
print("listens", flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("job", JOBS)
def test_what_init_writes_passes_check(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rama.toml"
    assert main(["init", job, str(file)]) == 0
    told = capsys.readouterr().out
    assert main(["check", str(file), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["mistakes"] == []
    # Others may read none of its secrets: whatever it warns of is a port that somebody has on this machine.
    assert [text for text in checked["warnings"] if " is taken: " not in text] == []
    made = sorted(map(str, tmp_path.iterdir()))
    assert all(path in told for path in made)


def test_every_job_has_its_file_and_every_setting_its_comment() -> None:
    folder = Path(__file__).parents[2] / "rama_ebpf/cli/jobs"
    assert sorted(path.stem for path in folder.iterdir()) == sorted(JOBS)
    for path in folder.iterdir():
        lines = path.read_text().splitlines()
        assert sum(line.lstrip().startswith("#") for line in lines) >= 12, path
        assert f"run --config {'rama.toml'}" in path.read_text()


@pytest.mark.parametrize("name", ["rama.toml", "there"])
def test_init_never_overwrites(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / name
    if name == "there":
        file.symlink_to(tmp_path / "nowhere")
    else:
        file.write_text("mine")
    assert main(["init", "socks5", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"rama-ebpf init: {file} exists: name another file, or remove it if nothing needs it\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert file.is_symlink() or file.read_text() == "mine"


def test_init_keeps_users_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = tmp_path / "users.txt"
    users.write_text("# mine\n")
    assert main(["init", "socks5", str(tmp_path / "rama.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == [str(users)]
    assert users.read_text() == "# mine\n"


def test_init_leaves_nothing_behind_that_check_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "server.crt").write_text("no certificate")
    (tmp_path / "server.key").write_text("no key")
    assert main(["init", "reverse", str(tmp_path / "rama.toml")]) == 2
    assert "stacks.web" in capsys.readouterr().err
    (tmp_path / "server.key").unlink()
    assert main(["init", "reverse", str(tmp_path / "rama.toml")]) == 2
    assert "without its other half" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["server.crt"]


def test_users_that_are_written_get_in_by_the_configuration_of_init(tmp_path: Path) -> None:
    assert main(["init", "socks5", str(tmp_path / "proxy.toml")]) == 0
    text = (tmp_path / "proxy.toml").read_text()
    assert "rama.toml" not in text
    assert "run --config proxy.toml" in text
    assert re.search(r"users\.txt", text)
    service = load_config(tmp_path / "proxy.toml").stacks["socks"].service
    assert str(service.users) == str(tmp_path / "users.txt")  # type: ignore[attr-defined]


@pytest.mark.root
@pytest.mark.ebpf
def test_shield_of_init_serves_whom_no_rule_shuts_out(lab: Lab, start_proxy: StartProxy, tmp_path: Path) -> None:
    host, client = lab.host("proxy"), lab.host("client")
    service = host.popen(sys.executable, "-c", SERVICE, stdout=subprocess.PIPE)
    assert service.stdout is not None
    assert service.stdout.readline()
    assert main(["init", "shield", str(tmp_path / "rama.toml")]) == 0
    tmp_path.chmod(0o755)
    proxy = start_proxy(host, "--config", str(tmp_path / "rama.toml"))
    with client.connect(host.ipv4, 8000) as sock:
        assert sock.recv(100) == b"hello"
    proxy.command("block", client.ipv4)
    assert proxy.json("test", f"{client.ipv4}:8000", check=False)["action"] == "drop"

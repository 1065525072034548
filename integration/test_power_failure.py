"""What a power failure leaves: the disk as it was at that moment, of which a copy is mounted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import Lab, wait_for
from tests.proxy import ProxyProcess

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT = 1080


def _mount(image: Path, where: Path) -> None:
    where.mkdir(exist_ok=True)
    # With these the file system writes nothing by itself for as long as a test runs.
    options = "loop,commit=300,noatime"
    subprocess.run(["mount", "-t", "ext4", "-o", options, str(image), str(where)], check=True)


Left = Callable[[str], list[dict[str, object]]]


@pytest.fixture
def left(tmp_path: Path, instance: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Left]:
    """State is kept on a disk of its own. Return what its files, by name, would hold if power failed now."""
    image, disk, copy, after = (tmp_path / name for name in ("image", "disk", "copy", "after"))
    image.touch()
    os.truncate(image, 16 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    _mount(image, disk)

    def read(name: str) -> list[dict[str, object]]:
        shutil.copy(image, copy)
        _mount(copy, after)
        try:
            file = after / instance / name
            return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        finally:
            subprocess.run(["umount", str(after)], check=True)

    try:
        monkeypatch.setenv("RAMA_EBPF_STATE_DIR", str(disk))
        yield read
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_bans_and_loads_are_on_disk_when_the_command_returns_and_bans_of_strikes_soon_after(
    lab: Lab, left: Left, instance: str, tmp_path: Path
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    config = tmp_path / "rama.toml"
    config.write_text(
        f'[server]\nworkers = 1\n[listeners.socks]\naddress = "{server.ipv4}:{PORT}"\nstack = "s"\n[stacks.s]\n'
        'service = "mixed"\nlayers = [{ strikes = { strikes = 1, window = "5m", ban = "1h" } }]\n'
    )
    proxy = ProxyProcess(server, instance, "--config", str(config)).start()
    try:
        proxy.command("ban", "198.18.7.7")
        assert [row["address"] for row in left("bans")] == ["198.18.7.7"]
        proxy.command("block", "198.18.8.0/24")
        assert left("rules")[-1]["source"] == "198.18.8.0/24"
        rules = tmp_path / "policy.toml"
        rules.write_text('default = "allow"\n')
        proxy.command("policy", "load", str(rules))
        assert [entry["what"] for entry in left("journal")][-3:] == ["ban", "add", "load"]
        proxy.command("unblock", "198.18.8.0/24")
        assert left("rules")[-1]["removed"] is True
        proxy.command("unblock", "198.18.7.7")
        assert left("bans")[-1]["lifted"]

        with client.connect(server.ipv4, PORT) as sock:
            sock.sendall(b"\xff\xfe nothing that a proxy speaks\r\n\r\n")
        wait_for(lambda: left("bans")[-1]["address"] == client.ipv4, what="the ban of the strike")
    finally:
        proxy.end()

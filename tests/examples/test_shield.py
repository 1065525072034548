from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from ..lab import Host
from .conftest import EXAMPLES, dropped


def test_rules_from_code_stand_before_any_server(host: Host, instance: str, directory: Path) -> None:
    shutil.copy(EXAMPLES / "shield.py", directory)
    (directory / "blocked.txt").write_text("127.0.9.0/24\n198.51.100.7\n")
    server = host.call(lambda: socket.create_server(("127.0.0.1", 2022)))
    environment = {**os.environ, "RAMA_EBPF_INSTANCE": instance}
    with server:
        shield = host.popen(sys.executable, "shield.py", "2022", cwd=directory, env=environment, stdout=subprocess.PIPE)
        assert shield.stdout is not None
        assert shield.stdout.readline() == "guarding port 2022\n"
        assert dropped(host, 2022, "127.0.9.9")
        assert not dropped(host, 2022, "127.0.8.8")
        shield.kill()
        shield.wait()
        assert not dropped(host, 2022, "127.0.9.9")
    unload(Instance(instance))

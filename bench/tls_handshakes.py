"""TLS handshakes per second, full and resumed, and per CPU second of the server: ``python -m bench.tls_handshakes
[SECONDS]``.

The client is ``openssl s_time -new`` or ``-reuse``: connect, handshake, close. It waits for no tickets, so it resumes
in TLS 1.2 only. It shares the host with the server, so the figure for a CPU second is the one to compare.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tls.pki import Authority

from .tls_servers import NAMES, Contestant, serving, spread

ROUNDS = 3
CLIENTS = 2
RUNS = (("-tls1_2", "-new"), ("-tls1_2", "-reuse"), ("-tls1_3", "-new"))


def connect(server: Contestant, version: str, how: str, seconds: int) -> tuple[float, float]:
    """Return handshakes per second, and per CPU second of the server."""
    argv = ["openssl", "s_time", "-connect", f"127.0.0.1:{server.port}", how, version, "-time", str(seconds)]
    before = server.cpu()
    clients = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(CLIENTS)]
    done = 0
    for client in clients:
        out, _ = client.communicate()
        found = re.search(r"(\d+) connections in \d+ real seconds", out)
        if found is None:
            raise RuntimeError(out)
        done += int(found[1])
    return done / seconds, done / (server.cpu() - before)


def main() -> None:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as directory:
        leaf = Authority(Path(directory)).issue("bench.test")
        print(f"{'':10}{'version':>8}{'':>7}{'per second':>20}{'per CPU second':>20}")
        for version, how in RUNS:
            rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
            for _ in range(ROUNDS):
                for name in NAMES:  # in turn: what else the host does hits all of them alike
                    with serving(name, 0, leaf.chain, leaf.key) as server:
                        connect(server, version, how, 1)  # warm
                        rounds[name].append(connect(server, version, how, seconds))
            for name in NAMES:
                wall, cpu = map(spread, zip(*rounds[name], strict=True))
                print(f"{name:10}{version[1:]:>8}{how[1:]:>7}{wall:>20}{cpu:>20}", flush=True)


if __name__ == "__main__":
    main()

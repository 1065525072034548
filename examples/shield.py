"""Pre-accept rules from code, for any server of this host: ``python shield.py 8080``, as root."""

import sys
from pathlib import Path

from rama_ebpf import SyncGate

with SyncGate() as gate, gate.guard(int(sys.argv[1])) as guard:
    gate.block(Path("blocked.txt").read_text().split(), ttl="1d", reason="blocked.txt")
    print(f"guarding port {sys.argv[1]}", flush=True)
    guard.wait()

"""``python -m tests.crash.under FD COMMAND…``: run a command that is watched by who reads FD."""

from __future__ import annotations

import os
import socket
import sys

from .interpose import be_watched

if __name__ == "__main__":
    report = socket.socket(fileno=int(sys.argv[1]))
    be_watched(report)
    os.execv(sys.argv[2], sys.argv[2:])

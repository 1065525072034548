"""Benches. What their instances keep on disk, bans and journals, goes to a directory that ends with the process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

if "RAMA_EBPF_STATE_DIR" not in os.environ:  # the processes that a bench starts use its directory
    os.environ["RAMA_EBPF_STATE_DIR"] = tempfile.mkdtemp(prefix="rama-ebpf-bench-")
    atexit.register(shutil.rmtree, os.environ["RAMA_EBPF_STATE_DIR"], ignore_errors=True)

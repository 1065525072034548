"""The corpora: one file a target, one input a line, in Python's escapes of bytes as Latin-1.

libFuzzer wants a directory with a file for each input. :func:`fuzz` makes one for the time of a run, and puts what was
found into the corpus's file.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

__all__ = ["fuzz", "read_corpus", "write_corpus"]

_DIRECTORY: Final = "RAMA_EBPF_FUZZ_DIRECTORY"


def read_corpus(path: Path) -> list[bytes]:
    """Return the inputs, in the order of their SHA-1."""
    lines = path.read_text(encoding="ascii").split("\n")[:-1]
    return [line.encode("ascii").decode("unicode_escape").encode("latin-1") for line in lines]


def write_corpus(path: Path, inputs: Iterable[bytes]) -> None:
    """Replace a corpus; duplicates are dropped."""
    lines = [data.decode("latin-1").encode("unicode_escape").decode("ascii") for data in sorted(set(inputs), key=_name)]
    path.write_text("".join(line + "\n" for line in lines), encoding="ascii")


def _name(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def fuzz(module: str, path: Path, run: Callable[[Path], None]) -> None:
    """Run libFuzzer on a directory that holds the corpus ``path``, then write what is in it to that file.

    libFuzzer ends its process, and starts itself anew for ``-merge=1``: so it runs in a child, which is ``module``
    called with our arguments; there this calls ``run`` with the directory.
    """
    told = os.environ.get(_DIRECTORY)
    if told is not None:
        run(Path(told))
        return
    with tempfile.TemporaryDirectory(prefix="rama-ebpf-fuzz-") as directory:
        for data in read_corpus(path):
            (Path(directory) / _name(data)).write_bytes(data)
        child = subprocess.run(
            [sys.executable, "-m", module, *sys.argv[1:]], env={**os.environ, _DIRECTORY: directory}, check=False
        )
        write_corpus(path, [file.read_bytes() for file in Path(directory).iterdir()])
    sys.exit(child.returncode)

"""The BPF file system, where maps are pinned so that other processes find them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

__all__ = ["BPFFS", "ensure_mounted", "is_mounted", "remove_tree"]

BPFFS: Final = Path("/sys/fs/bpf")


def is_mounted() -> bool:
    """Whether :data:`BPFFS` is a BPF file system."""
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        return any(line.split()[4] == str(BPFFS) and " - bpf " in line for line in lines)


def ensure_mounted() -> None:
    """Mount a BPF file system at :data:`BPFFS` unless there is one, as bpftool and iproute2 do. Raises OSError."""
    if is_mounted():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(BPFFS), b"bpf", 0, b"mode=0700") != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot mount a BPF file system at {BPFFS}: {os.strerror(number)}")


def remove_tree(directory: Path) -> None:
    """Unpin everything below ``directory`` and remove it. A directory that is not there is fine."""
    if not directory.is_dir():
        return
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
        else:
            entry.unlink()
    directory.rmdir()

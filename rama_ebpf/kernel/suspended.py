"""Whether a process is stopped, as by Ctrl-Z or SIGSTOP: then it holds what it holds, and answers nobody."""

from __future__ import annotations

__all__ = ["is_stopped", "stopped_hint"]


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped; False if there is none (proc(5))."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


def stopped_hint(pid: int) -> str:
    """What to say behind the name of a process if it is stopped, nothing if it is not."""
    return f"; it is stopped: fg in its terminal, or kill -CONT {pid}, has it go on" if is_stopped(pid) else ""

"""Compile and load BPF programs with BCC, in a child process.

BCC brings LLVM, about 120 MiB of it. So the work is done in a short-lived child (``python -m
rama_ebpf.kernel.compile``) that sends the descriptors of the loaded programs back over a socket and exits; the server
never imports BCC.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import headers

__all__ = ["CompileError", "Program", "amalgamate", "compile_and_load"]

_TIMEOUT_SECONDS: Final = 300  # a program takes 0.3 s on hardware and some seconds under emulation


class CompileError(RuntimeError):
    """BCC is missing, a source does not compile, or the kernel's verifier refuses a program. The text says which."""


@dataclass(frozen=True, slots=True)
class Program:
    """A function to load: its name, ``enum bpf_prog_type``, and the expected ``enum bpf_attach_type`` or None."""

    name: str
    prog_type: int
    attach_type: int | None = None


def amalgamate(main: Path) -> str:
    """Return ``main`` with each ``#include "file"`` replaced by that file, once, and #line marks for error positions.

    BCC rewrites map accesses in its main file only. Raises FileNotFoundError for an include that is not there.
    """
    seen: set[Path] = set()

    def expand(path: Path) -> list[str]:
        if path in seen:
            return []
        seen.add(path)
        out = [f'#line 1 "{path.name}"']
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            include = re.match(r'#include "([^"]+)"', line)
            if include:
                out += expand(path.parent / include[1])
                out.append(f'#line {number + 1} "{path.name}"')
            else:
                out.append(line)
        return out

    return "\n".join(expand(main)) + "\n"


def compile_and_load(
    source: str, programs: list[Program], *, cflags: list[str] | None = None, kernel_headers: Path | None = None
) -> dict[str, int]:
    """Compile ``source``, load ``programs``, and return their descriptors by name.

    ``kernel_headers`` is a kernel build tree to compile against instead of the stub tree. Raises
    :class:`CompileError` with what the compiler or the verifier said.
    """
    request = json.dumps(
        {
            "source": source,
            "cflags": cflags or [],
            "programs": [[p.name, p.prog_type, p.attach_type] for p in programs],
            "kernel_headers": str(kernel_headers) if kernel_headers else None,
        }
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        try:
            output, _ = child.communicate(request.encode(), timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise CompileError(f"BCC did not finish within {_TIMEOUT_SECONDS} s") from None
        finally:
            child.kill()
            child.wait()
        fds: list[int] = []
        if child.returncode == 0:
            _, fds, _, _ = socket.recv_fds(ours, 1, len(programs))
        if len(fds) != len(programs):
            for fd in fds:
                os.close(fd)
            raise CompileError(_explain(output.decode(errors="replace"), child.returncode))
    return {program.name: fd for program, fd in zip(programs, fds, strict=True)}


def _explain(output: str, status: int) -> str:
    if "No module named 'bcc'" in output:
        return "BCC is not installed for this Python (Debian, Ubuntu: python3-bpfcc; Fedora: python3-bcc)"
    if "file not found" in output and "linux/" in output and not headers.uapi_present():
        return "the UAPI headers are not installed (Debian, Ubuntu: linux-libc-dev; Fedora: kernel-headers)"
    lines = output.strip().splitlines()
    return f"BCC failed with status {status}:\n" + "\n".join(lines[-40:])


def _child(reply_fd: int) -> None:
    request = json.load(sys.stdin)
    with tempfile.TemporaryDirectory(prefix="rama-ebpf-headers-") as scratch:
        flags = ["-Wno-macro-redefined", "-Wno-incompatible-pointer-types", *request["cflags"]]
        if request["kernel_headers"]:
            os.environ["BCC_KERNEL_SOURCE"] = request["kernel_headers"]
        else:
            headers.write_stub_tree(Path(scratch))
            os.environ["BCC_KERNEL_SOURCE"] = scratch
            flags += headers.cflags()
        from bcc import BPF  # here and nowhere else: it loads LLVM

        module = BPF(text=request["source"], cflags=flags)
        fds = []
        for name, prog_type, attach_type in request["programs"]:
            if attach_type is None:
                function = module.load_func(name, prog_type)
            else:
                function = module.load_func(name, prog_type, attach_type=attach_type)
            fds.append(function.fd)
        with socket.socket(fileno=reply_fd) as reply:
            socket.send_fds(reply, [b"k"], fds)


if __name__ == "__main__":
    _child(int(sys.argv[1]))

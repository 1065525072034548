"""Compile BPF programs with BCC, in a child process.

BCC brings LLVM, about 120 MiB of it. So the work is done in a short-lived child (``python -m
rama_ebpf.kernel.compile``) that writes the bytecode to its parent and exits; the server never imports BCC. Who wants
programs loaded asks :mod:`.programs`, which keeps what was compiled.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..core.interpreter import module_command
from . import bpf, headers
from .bytecode import Bytecode, Program

__all__ = ["CompileError", "Unit", "amalgamate", "compile_unit"]

_TIMEOUT_SECONDS: Final = 300  # a program takes 0.3 s on hardware and some seconds under emulation


class CompileError(RuntimeError):
    """BCC is missing, a source does not compile, or the kernel's verifier refuses a program. The text says which."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What is compiled in one go: a source, the programs that are wanted of it, and the flags it depends on.

    ``kernel_headers`` is a kernel build tree to compile against instead of the stub tree.
    """

    source: str
    programs: tuple[Program, ...]
    cflags: tuple[str, ...] = ()
    kernel_headers: Path | None = None


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


def compile_unit(unit: Unit, maps: Mapping[str, int], pins: Path) -> tuple[list[Bytecode], list[Path]]:
    """Return the bytecode of a unit's programs, and the files that the compiler was made of.

    ``maps`` are open descriptors by name, pinned by these names in the directory ``pins``: BCC finds maps by pins only,
    and makes one that it does not find. Raises :class:`CompileError` with what the compiler said.
    """
    request = json.dumps(
        {
            "source": unit.source,
            "cflags": [*unit.cflags, f'-DPIN_DIR="{pins}"'],
            "programs": [program.name for program in unit.programs],
            "maps": {bpf.map_info(fd).id: name for name, fd in maps.items()},
            "kernel_headers": str(unit.kernel_headers) if unit.kernel_headers else None,
        }
    )
    with tempfile.TemporaryFile() as reply:
        child = subprocess.Popen(
            module_command(__spec__.name, str(reply.fileno())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(reply.fileno(),),
        )
        try:
            output, _ = child.communicate(request.encode(), timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise CompileError(f"BCC did not finish within {_TIMEOUT_SECONDS} s") from None
        finally:
            child.kill()
            child.wait()
        if child.returncode != 0:
            raise CompileError(_explain(output.decode(errors="replace"), child.returncode))
        reply.seek(0)
        answer = json.load(reply)
    compiled = [
        Bytecode(program, base64.b64decode(code), tuple((index, name) for index, name in named))
        for program, (code, named) in zip(unit.programs, answer["programs"], strict=True)
    ]
    return compiled, [Path(path) for path in answer["tools"]]


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
        import bcc  # here and nowhere else: it loads LLVM

        module = bcc.BPF(text=request["source"], cflags=flags)
        names = {int(identity): name for identity, name in request["maps"].items()}
        programs = []
        for name in request["programs"]:
            code = module.dump_func(name)
            taken = Bytecode.of(Program(name, 0), code, lambda fd: names[bpf.map_info(fd).id])
            programs.append((base64.b64encode(taken.code).decode(), taken.maps))
    tools = _tools(Path(bcc.__file__).parent)
    with open(reply_fd, "w", encoding="ascii") as reply:
        json.dump({"programs": programs, "tools": tools}, reply)


def _tools(package: Path) -> Sequence[str]:
    """The files that this process's compiler is made of; libraries by the names under which they are looked for, which
    lead to another file after an upgrade."""
    mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()}
    libraries: set[Path] = set()
    for path in mapped:
        stem, dot, version = path.name.partition(".so.")
        if dot and stem.startswith(("libbcc", "libLLVM", "libclang")):
            by_name = path.with_name(f"{stem}.so.{version.partition('.')[0]}")
            libraries.add(by_name if by_name.exists() else path)
    return [str(path) for path in (package / "version.py", *sorted(libraries)) if path.exists()]


if __name__ == "__main__":
    _child(int(sys.argv[1]))

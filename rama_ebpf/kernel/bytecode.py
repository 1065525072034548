"""Compiled programs, and how one is loaded by bpf(2) alone: no compiler is needed for it.

The code refers to maps by name. Which map that is, is decided at each load: the same code serves every instance.

Reference: ``include/uapi/linux/bpf.h``, BPF_PROG_LOAD; ``Documentation/bpf/standardization/instruction-set.rst``,
"64-bit immediate instructions" (BPF_PSEUDO_MAP_FD).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from . import bpf

__all__ = ["Bytecode", "Program", "RefusedByVerifier"]

_INSTRUCTION: Final = struct.Struct("=BBhi")  # opcode, registers, offset, immediate
_LOAD_64: Final = 0x18  # BPF_LD | BPF_IMM | BPF_DW: takes two instructions
_MAP_FD: Final = 1  # BPF_PSEUDO_MAP_FD, in place of a source register


class RefusedByVerifier(RuntimeError):
    """The kernel does not load a program; the text ends with what its verifier said."""


@dataclass(frozen=True, slots=True)
class Program:
    """A function to load: its name, ``enum bpf_prog_type``, and the expected ``enum bpf_attach_type`` or None."""

    name: str
    prog_type: int
    attach_type: int | None = None


@dataclass(frozen=True, slots=True)
class Bytecode:
    """The instructions of a program. ``maps`` says which of them (by index) name a map, and which map."""

    program: Program
    code: bytes
    maps: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, program: Program, code: bytes, map_name: Callable[[int], str]) -> Bytecode:
        """Take the descriptors out of code that was made for open maps. ``map_name`` tells what a descriptor is.

        Raises ValueError for code that refers to anything else, which could not be loaded a second time.
        """
        clean, maps, at = bytearray(code), [], 0
        while at < len(code):
            opcode, registers, offset, immediate = _INSTRUCTION.unpack_from(code, at)
            if opcode != _LOAD_64:
                at += _INSTRUCTION.size
                continue
            kind = registers >> 4
            if kind not in (0, _MAP_FD):
                raise ValueError(f"{program.name}: instruction {at // 8} refers to something of kind {kind}")
            if kind == _MAP_FD:
                maps.append((at // _INSTRUCTION.size, map_name(immediate)))
                _INSTRUCTION.pack_into(clean, at, opcode, registers, offset, 0)
            at += 2 * _INSTRUCTION.size
        return cls(program, bytes(clean), tuple(maps))

    def load(self, maps: Mapping[str, int]) -> int:
        """Load the program over these maps (descriptors by name) and return its descriptor.

        Raises :class:`RefusedByVerifier`, or OSError where nothing may be loaded at all; KeyError for a map that is not
        among ``maps``.
        """
        code = bytearray(self.code)
        for index, name in self.maps:
            struct.pack_into("=i", code, index * _INSTRUCTION.size + 4, maps[name])
        program = self.program
        try:
            return bpf.prog_load(program.prog_type, bytes(code), program.attach_type or 0, program.name)
        except OSError as error:
            if error.errno == errno.EPERM:  # not for us; what the verifier objects to is EACCES or EINVAL
                raise
            said = bpf.verifier_log(program.prog_type, bytes(code), program.attach_type or 0)
            raise RefusedByVerifier(
                f"the kernel does not load {program.name}: {error.strerror}\n" + "\n".join(said.splitlines()[-40:])
            ) from error

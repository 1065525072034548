"""From a unit's source to programs in the kernel: the compiler is asked only for what no earlier start has kept.

The walk of a load: :mod:`.code_cache` is asked for the unit's bytecode; if it has none, :mod:`.compile` makes it, in a
child, and it is kept; :mod:`.bytecode` puts this instance's maps into it and gives it to the kernel.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from . import bpf, bpffs
from .bytecode import Bytecode, RefusedByVerifier
from .code_cache import CodeCache
from .compile import CompileError, Unit, compile_unit
from .instance import state_root

__all__ = ["code_cache", "load_programs"]

log = logging.getLogger(__name__)


def code_cache() -> CodeCache:
    """Return the cache of this host, which all instances share; ``$RAMA_EBPF_STATE_DIR`` chooses its parent."""
    return CodeCache(state_root() / ".programs")  # no instance has such a name


def load_programs(unit: Unit, maps: Mapping[str, int], *, pins: Path | None = None) -> dict[str, int]:
    """Load the programs of a unit over ``maps`` (descriptors by name), and return their descriptors by name.

    ``pins`` is where the maps are pinned by these names; if they are not, they are for as long as the compiler works.
    Raises :class:`~.compile.CompileError` with what the compiler or the verifier said, or OSError.
    """
    cache = code_cache()
    kept = cache.find(unit)
    if kept is not None:
        try:
            return _load(kept, maps)
        except RefusedByVerifier as error:
            cache.discard(unit, str(error).splitlines()[0])
    begun = time.monotonic()
    log.info("compiling %d kernel programs, which takes some seconds, and is kept for later starts", len(unit.programs))
    with contextlib.nullcontext(pins) if pins is not None else _pinned(maps) as directory:
        compiled, tools = compile_unit(unit, maps, directory)
    log.info("compiled %d kernel programs in %.1f s", len(compiled), time.monotonic() - begun)
    try:
        loaded = _load(compiled, maps)
    except RefusedByVerifier as error:
        raise CompileError(str(error)) from error
    cache.keep(unit, compiled, tools)
    return loaded


def _load(code: list[Bytecode], maps: Mapping[str, int]) -> dict[str, int]:
    loaded: dict[str, int] = {}
    try:
        for item in code:
            loaded[item.program.name] = item.load(maps)
    except BaseException:
        for fd in loaded.values():
            os.close(fd)
        raise
    return loaded


@contextlib.contextmanager
def _pinned(maps: Mapping[str, int]) -> Iterator[Path]:
    bpffs.ensure_mounted()
    directory = Path(tempfile.mkdtemp(prefix="rama-ebpf-compile-", dir=bpffs.BPFFS))
    try:
        for name, fd in maps.items():
            bpf.obj_pin(fd, str(directory / name))
        yield directory
    finally:
        bpffs.remove_tree(directory)

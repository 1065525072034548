"""Compiled programs on disk, so that only the first start needs a compiler.

A file holds the bytecode of one unit, and is named after all that it was made from: the source, the flags, the
programs, and the kernel's release and build. Inside are a hash of its content, and size and time of change of every
file of the compiler and of the UAPI headers that were used. A file that is damaged, belongs to somebody else or may be
written by others, or was made by a compiler that has changed since is left out, with a line that says so, and replaced
by what is compiled then. A compiler that is no longer installed is no change: it is what this is for.

What is kept here runs in the kernel as the operator's policy. So the directory is the owner's alone (0700), files are
0600, and both are opened without following links.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from . import headers
from .bytecode import Bytecode
from .compile import Unit

__all__ = ["CodeCache"]

log = logging.getLogger(__name__)

_FORMAT: Final = 1
_MOST_FILES: Final = 32
"""Some for each kernel that is booted and each set of options; the oldest goes."""
_MOST_BYTES: Final = 8 * 1024 * 1024
_BUILD: Final = Path("/sys/kernel/notes")
_BTF: Final = Path("/sys/kernel/btf/vmlinux")


class _Unusable(Exception):
    """A file is there that must not be used; the text says why."""


class CodeCache:
    """The cache in a directory, which is made when there is something to keep."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, unit: Unit) -> Path:
        """Return where the bytecode of a unit is kept for the running kernel."""
        return self._directory / f"{_key(unit)}.json"

    def find(self, unit: Unit) -> list[Bytecode] | None:
        """Return what is kept of a unit, None if there is nothing that can be used."""
        path = self.path(unit)
        try:
            return self._read(path, unit)
        except FileNotFoundError:
            return None
        except (_Unusable, OSError) as error:
            log.warning("compiled programs in %s are not used, and are made anew: %s", path, error)
            return None

    def keep(self, unit: Unit, compiled: Iterable[Bytecode], tools: Iterable[Path]) -> None:
        """Keep the bytecode of a unit. A disk that refuses is logged: then the next start compiles again."""
        path = self.path(unit)
        made_of = {str(file): _state(file) for file in (*tools, *headers.included(unit.source), *_tree(unit))}
        body = json.dumps(
            {
                "made_of": {name: state for name, state in made_of.items() if state is not None},
                "programs": [[item.program.name, base64.b64encode(item.code).decode(), item.maps] for item in compiled],
            }
        ).encode()
        try:
            self._directory.parent.mkdir(parents=True, exist_ok=True)
            self._directory.mkdir(exist_ok=True, mode=0o700)
            with self._open() as directory:
                self._write(directory, path.name, _seal(body) + b"\n" + body)
                _forget_oldest(directory)
        except (_Unusable, OSError) as error:
            log.warning("compiled programs cannot be kept in %s, each start compiles: %s", self._directory, error)

    def discard(self, unit: Unit, why: str) -> None:
        """Forget what is kept of a unit, because it is of no use."""
        log.warning("compiled programs in %s are not used, and are made anew: %s", self.path(unit), why)
        with contextlib.suppress(FileNotFoundError):
            self.path(unit).unlink()

    def remove(self) -> None:
        """Remove all of it. Raises OSError."""
        with contextlib.suppress(FileNotFoundError), self._open():
            shutil.rmtree(self._directory)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _check_owner(fd, "the directory")
            yield fd
        finally:
            os.close(fd)

    def _read(self, path: Path, unit: Unit) -> list[Bytecode]:
        with self._open() as directory:
            fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
            with open(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise _Unusable("it is no file")
                _check_owner(fd, "the file")
                data = file.read(_MOST_BYTES)
        seal, _, body = data.partition(b"\n")
        if seal != _seal(body):
            raise _Unusable("it is damaged")
        kept = json.loads(body)
        for name, state in kept["made_of"].items():
            now = _state(Path(name))
            if now is not None and now != state:
                raise _Unusable(f"{name} has changed since")
        return [
            Bytecode(program, base64.b64decode(code), tuple((index, map_name) for index, map_name in maps))
            for program, (_, code, maps) in zip(unit.programs, kept["programs"], strict=True)
        ]

    def _write(self, directory: int, name: str, data: bytes) -> None:
        temporary = f"{name}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o600, dir_fd=directory), "wb") as file:
            file.write(data)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


def _check_owner(fd: int, what: str) -> None:
    found = os.fstat(fd)
    if found.st_uid != os.geteuid():
        raise _Unusable(f"{what} belongs to user {found.st_uid}")
    if found.st_mode & 0o077:
        raise _Unusable(f"{what} is open to others (mode {stat.S_IMODE(found.st_mode):o})")


def _seal(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _state(file: Path) -> list[int] | None:
    """Return size and time of change of a file, None if it is not there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _tree(unit: Unit) -> list[Path]:
    if unit.kernel_headers is None:
        return []
    generated = unit.kernel_headers / "include/generated"
    return [generated / "autoconf.h", generated / "uapi/linux/version.h"]


def _forget_oldest(directory: int) -> None:
    with os.scandir(directory) as entries:
        found = [(entry.stat(follow_symlinks=False).st_mtime_ns, entry.name) for entry in entries]
    for _, name in sorted(found)[:-_MOST_FILES]:
        os.unlink(name, dir_fd=directory)


def _key(unit: Unit) -> str:
    kernel = platform.uname()
    facts = {
        "format": _FORMAT,
        "source": unit.source,
        "cflags": unit.cflags,
        "programs": [(p.name, p.prog_type, p.attach_type) for p in unit.programs],
        "kernel_headers": str(unit.kernel_headers) if unit.kernel_headers else [headers.stub_tree(), headers.cflags()],
        "kernel": [kernel.system, kernel.release, kernel.version, kernel.machine, _kernel_build()],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]


def _kernel_build() -> str:
    """Identify the build of the running kernel: by its build id, or by its type information."""
    for path in (_BUILD, _BTF):
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            continue
    return ""

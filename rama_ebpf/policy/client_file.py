"""The record of who came, on disk: only where the operator wants it kept, and for as long.

One line of JSON with a checksum, then a row for each source, port and generation of the gate's maps: those count from
nothing again when they are made anew. It is replaced as a whole. A file that is torn is said to be, and begun anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from ..core.address import mapped, unmap
from .atomic import open_regular, write_atomically
from .clients import Client
from .rule import Action, Stage

__all__ = ["ClientFile", "merged"]

log = logging.getLogger(__name__)

_ROW: Final = struct.Struct("<16sHxxQdQdQ")  # source, port, let in, last, denied, last, generation
MOST_ROWS: Final = 262_144
"""Those that came last; 16 MiB."""
_HEAD: Final = 4096


class ClientFile:
    """The file at ``path``. Raises OSError where the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[tuple[int, Client]]:
        """Return (generation, row) of all that is kept; nothing where nothing is, or where it is damaged, which is
        logged."""
        try:
            with open(open_regular(self.path, os.O_RDONLY), "rb") as file:
                line, data = file.readline(_HEAD), file.read((MOST_ROWS + 1) * _ROW.size)
            head = json.loads(line)
            if head["format"] != 1 or head["sha256"] != hashlib.sha256(data).hexdigest():
                raise ValueError("its checksum is wrong")
            return [_unpack(row) for row in _ROW.iter_unpack(data)]
        except FileNotFoundError:
            return []
        except (ValueError, LookupError, TypeError, struct.error, RecursionError) as error:
            log.warning("the record of clients in %s is damaged and begun anew: %s", self.path, error)
            return []

    def write(self, generation: int, rows: Iterable[Client], keep: float) -> int:
        """Have the rows of this generation, and those of others that are no older than ``keep`` seconds; return how
        many there are."""
        since = time.time() - keep
        kept = {(row.source, row.port, gen): row for gen, row in self.read() if gen != generation}
        kept |= {(row.source, row.port, generation): row for row in rows}
        latest = sorted(
            ((gen, row) for (_, _, gen), row in kept.items() if row.last >= since), key=lambda pair: -pair[1].last
        )[:MOST_ROWS]
        data = b"".join(
            _ROW.pack(mapped(row.source), row.port, row.let_in, row.let_in_last, row.denied, row.denied_last, gen)
            for gen, row in latest
        )
        head = {"format": 1, "time": time.time(), "rows": len(latest), "sha256": hashlib.sha256(data).hexdigest()}
        try:
            write_atomically(self.path, json.dumps(head).encode() + b"\n" + data)
        except OSError as error:
            raise OSError(error.errno or errno.EIO, f"cannot write {self.path}: {error.strerror}") from error
        return len(latest)


def _unpack(fields: tuple[bytes, int, int, float, int, float, int]) -> tuple[int, Client]:
    packed, port, let_in, let_in_last, denied, denied_last, generation = fields
    stage, action = (Stage.NONE, Action.NONE)
    return generation, Client(
        unmap(ip_address(packed)), port, let_in, let_in_last, denied, denied_last, "", stage, action, ""
    )


def merged(kept: Iterable[tuple[int, Client]], generation: int, present: Iterable[Client]) -> list[Client]:
    """Return one row for each source and port: what is kept of other generations, and what is counted now."""
    found = {(row.source, row.port): row for row in present}
    for gen, row in kept:
        if gen == generation:
            found.setdefault((row.source, row.port), row)
            continue
        known = found.get((row.source, row.port))
        found[row.source, row.port] = (
            row
            if known is None
            else replace(
                known,
                let_in=known.let_in + row.let_in,
                let_in_last=max(known.let_in_last, row.let_in_last),
                denied=known.denied + row.denied,
                denied_last=max(known.denied_last, row.denied_last),
            )
        )
    return list(found.values())

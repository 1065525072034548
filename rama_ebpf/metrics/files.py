"""Reading what workers have counted: the files of prometheus-client's multiprocess mode, as strangers' bytes.

A worker may have been taken over by its clients, so these are read by a process without privileges, up to a bound, and
whatever is wrong with one costs that file and nothing else. ``MultiProcessCollector`` would wait at a FIFO and allocate
what a length field asks for.

A file begins with how many of its bytes are used (a native 32-bit integer, then four bytes of padding). Entries
follow: a length, a key of that length (JSON: metric, sample, labels, help), padding to a multiple of 8, value and time
(doubles).
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString

from .directory import ENDED

__all__ = ["FILE_BYTES", "MAX_FILES", "MAX_SERIES", "FilesSum", "read_entries"]

log = logging.getLogger(__name__)

FILE_BYTES: Final = 8 * 1024 * 1024
"""A file may be so long: a worker of ours needs one of 1 MiB."""
MAX_SERIES: Final = 10_000
"""Samples of one file."""
MAX_FILES: Final = 8192
"""That are looked at."""
_KEY_BYTES: Final = 4096
_TYPES: Final = frozenset({"counter", "gauge", "histogram"})

Labels = tuple[tuple[str, str], ...]


def read_entries(data: bytes) -> Iterator[tuple[str, str, Labels, str, float]]:
    """Yield metric, sample, labels, help and value. Raises ValueError for what is no such file."""
    if len(data) < 8:
        return  # made a moment ago
    used = struct.unpack_from("=i", data)[0]
    if not 0 <= used <= len(data):
        raise ValueError(f"{used} bytes of {len(data)} are said to be used")
    at, count = 8, 0
    while at < used:
        if at + 4 > used:
            raise ValueError(f"an entry is cut off at {at}")
        length = struct.unpack_from("=i", data, at)[0]
        values = at + 4 + length + (8 - (length + 4) % 8)
        if not 0 < length <= _KEY_BYTES or values + 16 > used:
            raise ValueError(f"a key of {length} bytes at {at}")
        yield *_key(data[at + 4 : at + 4 + length]), struct.unpack_from("=d", data, values)[0]
        at, count = values + 16, count + 1
        if count > MAX_SERIES:
            raise ValueError(f"more than {MAX_SERIES} series")


def _key(data: bytes) -> tuple[str, str, Labels, str]:
    try:
        metric, sample, labels, text = json.loads(data)
        pairs = tuple(sorted((name, value) for name, value in labels.items()))
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a key that is none: {error}") from error
    words = (metric, sample, text, *itertools.chain.from_iterable(pairs))
    if not all(isinstance(word, str) for word in words) or not metric.startswith("rama_"):
        raise ValueError("a key that is none of ours")
    if sample.removeprefix(metric) not in ("", "_total", "_bucket", "_sum") or not all(
        name.isascii() and name.isidentifier() for name, _ in pairs
    ):
        raise ValueError("a sample that is none of ours")
    return metric, sample, pairs, text


@dataclass(slots=True)
class _Family:
    kind: str
    text: str
    values: dict[tuple[str, Labels], float] = field(default_factory=dict)


class FilesSum:
    """Adds up what all workers have counted. Files of those that have ended (:data:`.directory.ENDED`) are added to a
    sum in memory, once, and are to be removed then."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._ended: dict[str, _Family] = {}
        self._added: set[str] = set()

    def add(self, files: Iterable[tuple[str, int]]) -> tuple[list[Metric], list[str]]:
        """Return the sums of all ``files``, by name and open descriptor, and the names of those that need not be given
        again. What is wrong with a file is logged once."""
        families: dict[str, _Family] = {}
        added: set[str] = set()
        for name, fd in itertools.islice(files, MAX_FILES):
            kind, ended = name.partition("_")[0], ENDED in name
            if name in self._added:
                added.add(name)
                continue
            try:
                if kind not in _TYPES or not name.endswith(".db"):
                    raise ValueError("it is none of a worker's")
                entries = list(read_entries(_read(fd)))
                if any(families.get(metric, _Family(kind, "")).kind != kind for metric, *_ in entries):
                    raise ValueError("a metric of another type")
                if not all(math.isfinite(value) for *_, value in entries):
                    raise ValueError("a value that is no number")
            except (OSError, ValueError) as error:
                self.complain(name, error)
                entries = []
            for metric, sample, labels, text, value in entries:
                _add(self._ended if ended else families, metric, _Family(kind, text, {(sample, labels): value}))
            if ended:
                added.add(name)
        self._added = added
        for metric, family in self._ended.items():
            _add(families, metric, family)
        return [_metric(name, family) for name, family in families.items()], sorted(added)

    def complain(self, name: str, error: Exception) -> None:
        """Log why a file does not count, if that was not said of it before."""
        if name not in self._said and len(self._said) < MAX_FILES:
            self._said.add(name)
            log.error("the metrics in %s do not count: %s", name, error)


def _add(families: dict[str, _Family], metric: str, more: _Family) -> None:
    family = families.setdefault(metric, _Family(more.kind, more.text))
    for key, value in more.values.items():
        if key in family.values or len(family.values) < MAX_SERIES:
            family.values[key] = family.values.get(key, 0.0) + value


def _read(fd: int) -> bytes:
    status = os.fstat(fd)
    if status.st_size > FILE_BYTES:
        raise ValueError(f"longer than {FILE_BYTES} bytes")
    return os.pread(fd, status.st_size, 0)


def _metric(name: str, family: _Family) -> Metric:
    metric = Metric(name, family.text, family.kind)
    buckets: dict[Labels, dict[float, float]] = {}
    for (sample, labels), value in family.values.items():
        plain = dict(labels)
        if family.kind == "histogram" and sample.endswith("_bucket"):
            try:
                bound = float(plain.pop("le", "nan"))
            except ValueError:
                continue
            buckets.setdefault(tuple(sorted(plain.items())), {})[bound] = value
        else:
            metric.add_sample(sample, plain, value)
    for labels, by_bound in buckets.items():  # the files hold each bucket for itself
        total = 0.0
        for bound in sorted(by_bound):
            total += by_bound[bound]
            metric.add_sample(f"{name}_bucket", {**dict(labels), "le": str(floatToGoString(bound))}, total)  # type: ignore[no-untyped-call]
        metric.add_sample(f"{name}_count", dict(labels), total)
    return metric

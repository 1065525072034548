"""Reading what workers have counted: the files of prometheus-client's multiprocess mode, as strangers' bytes.

A worker may have been taken over by its clients, and what reads its files has the gate in its hands. So a file is
opened without waiting and without following links, is read up to a bound, and whatever is wrong with it costs that file
and nothing else. ``MultiProcessCollector`` would wait at a FIFO and allocate what a length field asks for.

A file begins with how many of its bytes are used (a native 32-bit integer, then four bytes of padding). Entries
follow: a length, a key of that length (JSON: metric, sample, labels, help), padding to a multiple of 8, value and time
(doubles).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import stat
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .directory import ENDED

__all__ = ["FILE_BYTES", "MAX_SERIES", "FilesCollector", "read_entries"]

log = logging.getLogger(__name__)

FILE_BYTES: Final = 8 * 1024 * 1024
"""A file may be so long: a worker of ours needs one of 1 MiB."""
MAX_SERIES: Final = 10_000
"""Samples of one file."""
_MAX_FILES: Final = 8192
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


class FilesCollector(Collector):
    """Adds up what all workers have counted. Files of those that have ended (:data:`.directory.ENDED`) are added to a
    sum in memory and removed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._said: set[str] = set()
        self._ended: dict[str, _Family] = {}
        self._lock = threading.Lock()

    def collect(self) -> Iterable[Metric]:
        """Return the sums. What is wrong with a file is logged once."""
        with self._lock:
            return self._collect()

    def _collect(self) -> Iterable[Metric]:
        families: dict[str, _Family] = {}
        for path in itertools.islice(sorted(self._directory.iterdir()), _MAX_FILES):
            kind, ended = path.name.partition("_")[0], ENDED in path.name
            try:
                if kind not in _TYPES or path.suffix != ".db":
                    raise ValueError("it is none of a worker's")
                entries = list(read_entries(_read(path)))
                if any(families.get(metric, _Family(kind, "")).kind != kind for metric, *_ in entries):
                    raise ValueError("a metric of another type")
                if not all(math.isfinite(value) for *_, value in entries):
                    raise ValueError("a value that is no number")
            except FileNotFoundError:
                continue  # of a worker that has ended
            except (OSError, ValueError) as error:
                if path.name not in self._said and len(self._said) < _MAX_FILES:
                    self._said.add(path.name)
                    log.error("the metrics in %s do not count: %s", path, error)
                if not ended:
                    continue
                entries = []
            for metric, sample, labels, text, value in entries:
                _add(self._ended if ended else families, metric, _Family(kind, text, {(sample, labels): value}))
            if ended:
                with contextlib.suppress(OSError):  # a directory, which stays until the end
                    path.unlink()
        for metric, family in self._ended.items():
            _add(families, metric, family)
        return [_metric(name, family) for name, family in families.items()]


def _add(families: dict[str, _Family], metric: str, more: _Family) -> None:
    family = families.setdefault(metric, _Family(more.kind, more.text))
    for key, value in more.values.items():
        if key in family.values or len(family.values) < MAX_SERIES:
            family.values[key] = family.values.get(key, 0.0) + value


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > FILE_BYTES:
            raise ValueError(f"longer than {FILE_BYTES} bytes")
        return file.read(min(status.st_size, FILE_BYTES))


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

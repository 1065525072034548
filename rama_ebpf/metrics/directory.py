"""How workers share their counters: files that each maps into its memory, merged when somebody asks.

This is prometheus-client's multiprocess mode. A worker opens its files while it has privileges, and nobody but root may
open them again. Files are named for a worker's number and generation instead of its process id. When a worker has ended
its files are put aside, and the next scrape adds them up and removes them, so their number stays bounded.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

__all__ = ["ENDED", "ENVIRONMENT", "MetricsDirectory", "open_files", "sweep", "use_identity"]

log = logging.getLogger(__name__)

_PREFIX: Final = "rama-ebpf-metrics-"

ENVIRONMENT = "PROMETHEUS_MULTIPROC_DIR"
ENDED: Final = "~"
"""In the names of files of workers that have ended."""


class MetricsDirectory:
    """A private directory for the files of one supervisor's workers; removed on exit. ``parent`` is by default ``/run``
    for root, which is in memory. ``adopted`` is the directory of another supervisor, which is to leave it to us.
    """

    def __init__(self, *, parent: str | None = None, adopted: Path | None = None) -> None:
        self.leave = False
        """Whether another supervisor removes it."""
        if adopted is not None:
            self.path = adopted
            self._numbers = itertools.count(time.time_ns())  # those before us have begun at 0, or earlier
            self._hold()
            return
        if parent is None and os.geteuid() == 0:
            parent = "/run"
        sweep(Path(tempfile.gettempdir() if parent is None else parent))
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
        self._numbers = itertools.count()
        self._hold()

    def _hold(self) -> None:
        self._held = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(self._held, fcntl.LOCK_SH | fcntl.LOCK_NB)

    @property
    def environment(self) -> Mapping[str, str]:
        """What the workers' environment needs."""
        return {ENVIRONMENT: str(self.path)}

    def worker_exited(self, identity: str) -> None:
        """Forget the gauges of a worker that has ended, and put its counters aside for the next scrape to add up."""
        for path in self.path.glob(f"*_{identity}.db"):
            if path.name.startswith("gauge_"):
                path.unlink()
            else:
                path.rename(path.with_name(f"{path.stem}{ENDED}{next(self._numbers)}.db"))

    def __enter__(self) -> MetricsDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._held)
        if not self.leave:
            shutil.rmtree(self.path)


def sweep(parent: Path) -> None:
    """Remove the directories of servers that were killed: nobody holds a lock on them, and their process is gone.

    Both are asked, for a server has a moment without its lock, and may be in another container that shares ``/run``.
    """
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # removed meanwhile, or none of ours
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            pid = path.name.removeprefix(_PREFIX).partition("-")[0]
            if pid.isdecimal() and not Path("/proc", pid).exists():
                shutil.rmtree(path)
                log.info("removed %s, which a killed server has left", path)
        except BlockingIOError:
            pass  # in use
        except OSError as error:
            log.warning("cannot remove %s, which a killed server has left: %s", path, error)
        finally:
            os.close(fd)


def use_identity(identity: str) -> None:
    """Name this process's files ``identity`` instead of its process id. Does nothing without a metrics directory.

    Raises RuntimeError if a metric was made before: it would have a file of another name.
    """
    if ENVIRONMENT not in os.environ:
        return
    if "rama_ebpf.metrics.definitions" in sys.modules:
        raise RuntimeError("the identity must be set before the first metric is made")
    from prometheus_client import values

    values.ValueClass = values.MultiProcessValue(lambda: identity)  # type: ignore[no-untyped-call]  # has no annotations


def open_files(listeners: Iterable[str]) -> None:
    """Open the files of this process, one for each kind of metric: later it may not be allowed to. Does nothing without
    a metrics directory."""
    if ENVIRONMENT not in os.environ:
        return
    from .definitions import ACCEPTED, CONNECTIONS  # and with them a histogram, which has no labels

    for name in listeners:
        ACCEPTED.labels(name)
        CONNECTIONS.labels(name)

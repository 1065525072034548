"""Fixtures for all suites. Kernel suites need root; where something is missing they fail, they do not skip."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from .lab import Host, Lab, temporary_directory, wait_for
from .leftovers import left_of, sweep
from .proxy import ProxyProcess

_numbers = itertools.count()


class _ByModule(LoadScopeScheduling):
    """A module's tests run in one process, which shares their fixtures; those of Docker, which share a daemon, in one
    as well."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return "docker" if "/docker/" in module else module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Any:
    """Spread modules, not tests, over the processes of ``-n``."""
    return _ByModule(config, log)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remove what runs that were killed left behind: once a run, before its processes begin."""
    if os.geteuid() == 0 and not hasattr(session.config, "workerinput"):
        swept = sweep()
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if swept and reporter is not None:
            reporter.write_line(f"removed what killed runs left: {', '.join(map(str, swept))}")


@pytest.fixture(scope="session", autouse=True)
def _state_of_our_own() -> Iterator[None]:
    """Journals, bans and copies of feeds go to a directory of this run, also those of the processes it starts, some of
    which are not root's."""
    with temporary_directory() as directory:
        directory.chmod(0o1777)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAMA_EBPF_STATE_DIR", str(directory))
            yield


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Fail if this run leaves pins, cgroups, namespaces or files below /run on the host, or pins of another user.

    What other runs beside this one have is theirs: names carry the process's id.
    """
    yield
    if os.geteuid() != 0:
        return
    left = left_of(os.getpid())
    assert not left, f"left behind: {', '.join(map(str, left))}"
    # A test of another process may have some just now.
    wait_for(lambda: not _foreign_pins(), timeout=60, what="the end of pins of another user")


def _foreign_pins() -> list[Path]:
    found = []
    for pins in Path("/sys/fs/bpf/rama-ebpf").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if pins.stat().st_uid != 0:
                found.append(pins)
    return found


@pytest.fixture
def lab() -> Iterator[Lab]:
    """An Ethernet segment to put hosts on."""
    with Lab() as made:
        yield made


@pytest.fixture
def instance() -> Iterator[str]:
    """The name of an instance of our own; whatever it leaves is removed."""
    with _instance() as name:
        yield name


StartProxy = Callable[..., ProxyProcess]


@pytest.fixture
def start_proxy(instance: str) -> Iterator[StartProxy]:
    """Start ``rama-ebpf run`` with arguments in a lab host; it is ended after the test."""
    with _starting(instance) as start:
        yield start


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    """As :func:`lab`, for the tests of a module together."""
    with Lab() as made:
        yield made


@pytest.fixture(scope="module")
def start_shared() -> Iterator[StartProxy]:
    """As :func:`start_proxy`, for tests of a module that only use their server: see
    :meth:`.proxy.ProxyProcess.forget_rules`."""
    with _instance() as name, _starting(name) as start:
        yield start


@contextlib.contextmanager
def _instance() -> Iterator[str]:
    name = f"test-{os.getpid()}-{next(_numbers)}"
    yield name
    wait_for(lambda: Instance(name).serving_pid() is None, what="the end of the server")
    unload(Instance(name))


@contextlib.contextmanager
def _starting(instance: str) -> Iterator[StartProxy]:
    started: list[ProxyProcess] = []

    def start(host: Host, *args: str, cwd: Path | None = None) -> ProxyProcess:
        proxy = ProxyProcess(host, instance, *args, cwd=cwd).start()
        started.append(proxy)
        return proxy

    try:
        yield start
    finally:
        for proxy in started:
            proxy.end()

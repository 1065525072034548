from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

from rama_ebpf.kernel.splice import SpliceMaps
from rama_ebpf.relay import RelayKind
from rama_ebpf.relay.engine import Engine
from rama_ebpf.relay.sockmap import Sockmap


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Workers run on uvloop, users' programs on either: what a tunnel owes its peers is tested on both."""
    both = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.SelectorEventLoop}
    return both if item.path.name in ("test_flows.py", "test_tunnel.py") else {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that hangs must end: uvloop logs and forgets what pytest-timeout's signal handler raises."""
    for item in items:
        if "tests/relay/" in item.nodeid:
            item.add_marker(pytest.mark.timeout(method="thread"))


@pytest.fixture(scope="session")
def splice_maps() -> Iterator[SpliceMaps]:
    """The relay's program and maps in this machine's kernel."""
    maps = SpliceMaps.load(shares=1, tunnels=256)
    yield maps
    maps.close()


@pytest.fixture
async def sockmap(splice_maps: SpliceMaps) -> Sockmap:
    """The kernel's relay for the tunnels of this test."""
    made = Sockmap(splice_maps.fds)
    Engine.current().use_sockmap(made)
    return made


@pytest.fixture(params=list(RelayKind))
async def kind(request: pytest.FixtureRequest, splice_maps: SpliceMaps) -> RelayKind:
    """Each relay in turn."""
    if request.param is RelayKind.SOCKMAP:
        Engine.current().use_sockmap(Sockmap(splice_maps.fds))
    return request.param

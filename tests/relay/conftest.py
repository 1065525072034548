from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Workers run on uvloop, users' programs on either: every test here runs on both."""
    return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that hangs must end: uvloop logs and forgets what pytest-timeout's signal handler raises."""
    for item in items:
        if "tests/relay/" in item.nodeid and "uvloop" in item.nodeid:
            item.add_marker(pytest.mark.timeout(method="thread"))

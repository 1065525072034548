"""Servers that are followed by others."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ..lab import Host
from .releases import UpgradedServer, upgraded_server

StartServer = Callable[..., UpgradedServer]


@pytest.fixture
def start_server(instance: str) -> Iterator[StartServer]:
    """Start a server of the first release; arguments as :meth:`.releases.UpgradedServer.configure` has them."""
    with ExitStack() as cleanup:
        # Not tmp_path: unprivileged workers must be able to reach it.
        parent = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="rama-ebpf-test-"))
        os.chmod(parent, 0o755)

        def start(host: Host, **configure: Any) -> UpgradedServer:
            return cleanup.enter_context(upgraded_server(host, instance, Path(parent), configure))

        yield start

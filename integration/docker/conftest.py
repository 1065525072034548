"""A daemon and the images, once for all tests; networks and containers are made by each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import Lab

from ..require import require
from .daemon import DockerDaemon, remove_stale
from .images import build


@pytest.fixture(scope="session")
def daemon() -> Iterator[DockerDaemon]:
    """A Docker daemon of our own with the images in it. Fails, and says what to install, where something is missing."""
    require("docker")
    remove_stale()
    with Lab() as lab, DockerDaemon(lab.host("docker")) as started:
        build(started.client, started.directory)
        yield started

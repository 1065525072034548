"""A part of the points of each operation, and of the server's start, reload and stop; ``make crash`` tries all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from ..lab import Lab, wait_for
from .forkserver import CommandRunner
from .operations import OPERATIONS, Operation, write_files
from .points import Trial
from .scene import Scene
from .server import ServerTrial

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(300)]


@dataclass
class Stage:
    """One gate for all tests of this module."""

    scene: Scene
    runner: CommandRunner
    trial: Trial
    server: ServerTrial


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("crash")
    name = f"test-{os.getpid()}-crash"
    with pytest.MonkeyPatch.context() as patch, Lab() as lab:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.chdir(directory)
        write_files(directory)
        scene = Scene(lab.host("proxy"), name)
        try:
            scene.proxy.start()
            with CommandRunner(name, scene.roots) as runner:
                trial = Trial(scene, runner, directory)
                trial.begin()
                yield Stage(scene, runner, trial, ServerTrial(scene, directory))
        finally:
            scene.proxy.end()
            wait_for(lambda: Instance(name).serving_pid() is None, what="the end of the server")
            unload(Instance(name))


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if one.in_tests], ids=lambda one: one.name)
def test_wherever_a_writer_dies_or_fails_the_gate_is_as_before_or_after(stage: Stage, operation: Operation) -> None:
    stage.trial.run(operation, every=90)
    faults, stage.trial.faults = stage.trial.faults, []
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("part", ["start", "reload", "stop", "stop that keeps"])
def test_wherever_the_server_dies_or_fails_nobody_gets_in_who_is_denied(stage: Stage, part: str) -> None:
    server = stage.server
    if part == "start":
        server.start(every=100)
    elif part == "reload":
        server.reload(every=70)
    else:
        server.stop(every=60, persist=part != "stop")
    faults, server.faults = server.faults, []
    assert not faults, "\n".join(faults)

from __future__ import annotations

from rama_ebpf.core import Extensions, Lifecycle, Stage


def test_watchers_hear_each_stage_once_and_never_backwards() -> None:
    heard: list[Stage] = []
    lifecycle = Lifecycle.of(Extensions())
    lifecycle.watch(heard.append)
    for stage in (Stage.ESTABLISHED, Stage.ESTABLISHED, Stage.TUNNEL, Stage.ESTABLISHED):
        lifecycle.reached(stage)
    assert heard == [Stage.ESTABLISHED, Stage.TUNNEL]


def test_a_fork_shares_its_connections_lifecycle() -> None:
    connection = Extensions()
    outer = Lifecycle.of(connection)
    assert Lifecycle.of(connection.fork()) is outer

from __future__ import annotations

import contextlib

import pytest

from ..lab import Host, wait_for
from .conftest import RunExample, exchange


def test_echo_logs_and_limits(run_example: RunExample, host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    run_example("echo:server", "--workers", "1", listen="127.0.0.1:7007")
    with contextlib.ExitStack() as clients:
        for _ in range(2):
            client = clients.enter_context(host.connect("127.0.0.1", 7007))
            assert exchange(client, b"hello", 5) == b"hello"
        third = clients.enter_context(host.connect("127.0.0.1", 7007))
        with pytest.raises(ConnectionResetError):
            third.recv(1)
    seen = ""

    def lines() -> list[str]:
        nonlocal seen
        seen += capfd.readouterr().out
        return [line for line in seen.splitlines() if line.startswith("echo: client=127.0.0.1:")]

    logged = wait_for(lambda: lines() if len(lines()) == 3 else None, what="three lines")
    assert sum("reason=done received=5 sent=5" in line for line in logged) == 2
    assert sum("reason=concurrency_limit received=0 sent=0" in line for line in logged) == 1

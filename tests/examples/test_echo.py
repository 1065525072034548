from __future__ import annotations

import contextlib

import pytest

from ..lab import Host, wait_for
from .conftest import RunExample, exchange


def test_echo_logs_and_limits(run_example: RunExample, host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    proxy = run_example("echo:server", "--workers", "1", listen="127.0.0.1:7007")
    with contextlib.ExitStack() as clients:
        for _ in range(2):
            client = clients.enter_context(host.connect("127.0.0.1", 7007))
            assert exchange(client, b"hello", 5) == b"hello"
        with pytest.raises(ConnectionResetError):  # of connect(2) already, if the server is quicker than it returns
            clients.enter_context(host.connect("127.0.0.1", 7007)).recv(1)
    # The server's own lines come after the stack's. Reading what is captured while it is written would lose some.
    wait_for(lambda: sum("rama_ebpf.access" in line for line in proxy.log) == 3, what="three connections' end")
    logged = [line for line in capfd.readouterr().out.splitlines() if line.startswith("echo: client=127.0.0.1:")]
    assert len(logged) == 3
    assert sum("reason=done received=5 sent=5" in line for line in logged) == 2
    assert sum("reason=concurrency_limit received=0 sent=0" in line for line in logged) == 1

from __future__ import annotations

import re

import pytest

from ..lab import Host
from .conftest import RunExample, dropped, exchange


def test_a_line_protocol_of_ones_own(run_example: RunExample, host: Host) -> None:
    run_example("own_service:server", listen="127.0.0.1:1313")
    with host.connect("127.0.0.1", 1313) as client:
        assert re.fullmatch(rb"\d\d:\d\d\n", exchange(client, b"TIME UTC\n", 6))
        client.sendall(b"TIME ")
        assert re.fullmatch(rb"\d\d:\d\d\n", exchange(client, b"Europe/Brussels\n", 6))
        assert exchange(client, b"TIME Nowhere\n", 22) == b"there is no such zone\n"
    for _ in range(3):
        with host.connect("127.0.0.1", 1313, source="127.0.4.4") as client:
            client.sendall(b"nonsense\n")
            with pytest.raises(ConnectionResetError):
                client.recv(100)
    assert dropped(host, 1313, "127.0.4.4")
    assert not dropped(host, 1313, "127.0.4.5")


def test_a_line_that_does_not_end_and_a_silent_client_are_cut(run_example: RunExample, host: Host) -> None:
    run_example("own_service:server", listen="127.0.0.1:1313")
    with host.connect("127.0.0.1", 1313) as client:
        client.sendall(b"T" * 300)
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    with host.connect("127.0.0.1", 1313) as client:
        client.settimeout(30)
        with pytest.raises(ConnectionResetError):
            client.recv(100)

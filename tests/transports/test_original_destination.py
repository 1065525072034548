from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from rama_ebpf.core import SocketAddress, SocketStream

from ..lab import Host, Lab

_REDIRECT = """
table inet test {
    chain output {
        type nat hook output priority -100;
        tcp dport 8000 redirect to :9000
    }
}
"""


@pytest.fixture
def host() -> Iterator[Host]:
    with Lab() as lab:
        host = lab.host("proxy")
        host.ip("link", "set", "lo", "up")
        yield host


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
@pytest.mark.parametrize("port", [8000, 9000])
async def test_original_destination_is_where_the_client_meant_to_connect(
    host: Host, family: int, address: str, port: int
) -> None:
    """Port 8000 is redirected by netfilter, port 9000 is connected to itself."""
    host.run("sh", "-c", f"echo '{_REDIRECT}' | nft -f -")
    with host.socket(family) as listener:
        listener.bind((address, 9000))
        listener.listen()
        with host.connect(address, port):
            stream = SocketStream(listener.accept()[0])
            assert stream.local is not None
            assert stream.local.port == 9000
            assert stream.original_destination == SocketAddress(stream.local.ip, port)
            await stream.close()


async def test_unix_sockets_have_no_destination() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        stream = SocketStream(ours)
        assert stream.original_destination is None
        await stream.close()

"""A parent of other people: datagrams and connections through Dante, exact."""

from __future__ import annotations

import asyncio
import shutil
import subprocess

import pytest

from rama_ebpf.core import Authority

from ..lab import wait_for
from .conftest import Peer, closed_port, echo, parent_of, routed
from .test_udp_and_bind import Client, UdpEcho, front


@pytest.fixture
def dante(tmp_path):
    danted = shutil.which("danted")
    assert danted is not None, "install dante-server (packaging/apt-test.txt)"
    port = closed_port()
    path = tmp_path / "danted.conf"
    path.write_text(
        f"logoutput: {tmp_path}/log\ninternal: 127.0.0.1 port = {port}\nexternal: lo\n"
        "socksmethod: none\nclientmethod: none\nuser.privileged: root\nuser.unprivileged: root\n"
        "client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\nsocks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\n"
    )
    process = subprocess.Popen([danted, "-f", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _listens(port), timeout=20, what="Dante")
        yield Peer("127.0.0.1", port)
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    shown = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout
    return f":{port} " in shown


async def test_datagrams_and_connections_go_through_dante(dante, run_service, serve):
    loop = asyncio.get_running_loop()
    transport, target = await loop.create_datagram_endpoint(UdpEcho, local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    connector = routed({"it": parent_of(dante, "socks5")})
    made = Client(await run_service(front(connector)))
    try:
        assert await made.associate() == 0
        for size in (1, 2, 100, 1400, 8000):
            made.send(bytes(size), port)
            assert await made.receive() == bytes(size)
        assert len(set(target.sources)) == 1
        tcp = await serve(echo)
        stream = await connector(Authority.of(tcp.host, tcp.port))
        await stream.write(b"hello")
        assert await stream.read_exactly(5) == b"hello"
        await stream.close()
    finally:
        made.close()
        transport.close()

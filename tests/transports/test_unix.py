from __future__ import annotations

import asyncio
import errno
import os
import stat
from pathlib import Path

import pytest

from rama_ebpf.core import Authority, StackError, Stream, client_address, stack
from rama_ebpf.layers.concurrency import ConcurrencyLimitLayer
from rama_ebpf.layers.source import by_source
from rama_ebpf.services.connect import ConnectError
from rama_ebpf.services.tcp import TcpServer, bind_tcp
from rama_ebpf.services.unix import PeerCredentials, PeerCredentialsLayer, UnixConnector, bind_unix

ANYWHERE = Authority.of("ignored", 1)


async def echo(stream: Stream) -> None:
    assert client_address(stream) is None
    while data := await stream.read():
        await stream.write(data)


@pytest.mark.parametrize("where", ["{tmp}/proxy.sock", "@rama-ebpf-test-{pid}"])
async def test_serves_and_connects(tmp_path: Path, where: str) -> None:
    path = where.format(tmp=tmp_path, pid=os.getpid())
    with bind_unix(path) as listener:
        server = TcpServer(listener, stack(ConcurrencyLimitLayer(1, key=by_source()), echo))
        server.start()
        stream = await UnixConnector(path)(ANYWHERE)
        await stream.write(b"hello")
        assert await stream.read_exactly(5) == b"hello"
        await stream.close()
        await server.drain(0)


async def test_only_mode_and_group_may_connect(tmp_path: Path) -> None:
    path = str(tmp_path / "proxy.sock")
    with bind_unix(path, mode=0o600, group=os.getgid()):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


async def test_a_socket_that_nobody_listens_on_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "proxy.sock")
    bind_unix(path).close()
    with bind_unix(path), pytest.raises(OSError, match="another process listens there") as refused:
        bind_unix(path)
    assert refused.value.errno == errno.EADDRINUSE


async def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="no socket"):
        bind_unix(str(path))
    assert path.read_text() == "data"


async def test_connector_says_what_failed(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match="No such file") as failed:
        await UnixConnector(str(tmp_path / "nowhere"))(ANYWHERE)
    assert failed.value.errno == errno.ENOENT


async def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "proxy.sock")
    with bind_unix(path, backlog=0) as listener:
        connect = UnixConnector(path, timeout=0.1)
        first = await connect(ANYWHERE)
        others = [connect(ANYWHERE) for _ in range(4)]  # a backlog of 0 holds one or two
        *_, last = await asyncio.gather(*others, return_exceptions=True)
        assert isinstance(last, ConnectError)
        assert last.errno == errno.ETIMEDOUT
        await first.close()
        listener.accept()[0].close()


async def test_the_peers_process_is_known(tmp_path: Path) -> None:
    path = str(tmp_path / "proxy.sock")
    seen: asyncio.Future[PeerCredentials] = asyncio.get_running_loop().create_future()

    async def note(stream: Stream) -> None:
        seen.set_result(stream.extensions.require(PeerCredentials))

    with bind_unix(path) as listener:
        server = TcpServer(listener, stack(PeerCredentialsLayer(), note))
        server.start()
        stream = await UnixConnector(path)(ANYWHERE)
        assert await seen == PeerCredentials(os.getpid(), os.getuid(), os.getgid())
        await stream.close()
        await server.drain(0)


async def test_credentials_of_a_tcp_peer_are_refused() -> None:
    errors: asyncio.Queue[BaseException] = asyncio.Queue()
    service = stack(PeerCredentialsLayer(), echo)

    async def observed(stream: Stream) -> None:
        try:
            await service(stream)
        except StackError as error:
            errors.put_nowait(error)

    with bind_tcp("127.0.0.1", 0) as listener:
        server = TcpServer(listener, observed)
        server.start()
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert "Unix socket" in str(await errors.get())
        writer.close()
        await writer.wait_closed()
        await server.drain(0)

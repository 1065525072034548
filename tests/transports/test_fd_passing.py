from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

import pytest

from rama_ebpf.core import PeerClosed, Stream
from rama_ebpf.services.fd_passing import MAX_SOCKETS, receive_sockets, send_sockets, sockets_of_service_manager
from rama_ebpf.services.tcp import TcpServer, bind_tcp


def channel() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


async def test_an_accepted_connection_is_served_by_whom_it_was_handed_to() -> None:
    async def echo(stream: Stream) -> None:
        await stream.write(await stream.read())

    ours, theirs = channel()
    with ours, theirs, bind_tcp("127.0.0.1", 0) as front, bind_tcp("127.0.0.1", 0) as unused:
        receiver = TcpServer(unused, echo)
        reader, writer = await asyncio.open_connection(*front.getsockname())
        accepted, _ = front.accept()
        with accepted:
            await send_sockets(ours, [accepted], b"listener 1")
        (handed,), note = await receive_sockets(theirs)
        assert note == b"listener 1"
        receiver.adopt(handed)
        writer.write(b"hello")
        assert await reader.read() == b"hello"
        writer.close()
        await writer.wait_closed()
        await receiver.drain(1)


async def test_many_in_one_message_and_waiting_for_room() -> None:
    ours, theirs = channel()
    with ours, theirs, socket.socket() as some:

        async def send_all() -> None:
            for number in range(1000):
                await send_sockets(ours, [some] * (MAX_SOCKETS if number == 0 else 1), str(number).encode())

        sending = asyncio.create_task(send_all())
        for number in range(1000):
            sockets, note = await receive_sockets(theirs)
            assert (len(sockets), note) == (MAX_SOCKETS if number == 0 else 1, str(number).encode())
            for sock in sockets:
                assert not sock.get_inheritable()
                sock.close()
        await sending


async def test_the_end_of_the_channel_is_told() -> None:
    ours, theirs = channel()
    ours.close()
    with theirs, pytest.raises(PeerClosed):
        await receive_sockets(theirs)


def test_sockets_of_a_service_manager() -> None:
    program = (
        "from rama_ebpf.services.fd_passing import sockets_of_service_manager as get; import os;"
        "print([(s.getsockname(), s.getblocking(), s.get_inheritable()) for s in get()])"
    )
    with bind_tcp("127.0.0.1", 0) as listener:
        shell = f'exec 3<&{listener.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" -c "$1"'
        done = subprocess.run(
            ["bash", "-c", shell, sys.executable, program],
            pass_fds=[listener.fileno()],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str([(listener.getsockname(), False, False)])


def test_sockets_meant_for_another_process_are_not_ours() -> None:
    assert sockets_of_service_manager({"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1"}) == []

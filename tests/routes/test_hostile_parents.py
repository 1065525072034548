"""What parents may send: at every byte, cut short, or noise. It is one kind of error, and it ends."""

from __future__ import annotations

import random

import pytest

from rama_ebpf.core import Authority
from rama_ebpf.routes import HealthLimits
from rama_ebpf.services.route.failure import WayFailed

from .conftest import parent_of, routed

TARGET = Authority.of("127.0.0.1", 9)
NEVER = HealthLimits(fall=1_000_000)
GOOD = {
    "http": b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n",
    "socks5": b"\5\0\5\0\0\1\x7f\0\0\1\0\x50",
    "socks4": b"\0\x5a" + bytes(6),
}


@pytest.mark.parametrize("scheme", list(GOOD))
async def test_answer_that_is_cut_or_spoilt_at_any_byte_is_the_parents_fault(serve, scheme):
    answers: list[bytes] = []

    async def parent(reader, writer):
        await reader.read(4096)
        writer.write(answers[-1])
        await writer.drain()

    peer = await serve(parent)
    connector = routed({"it": parent_of(peer, scheme, limits=NEVER)}, timeout=20)
    rng, good = random.Random(11), GOOD[scheme]
    answers += [good[:cut] for cut in range(len(good))]
    for at in range(len(good)):
        answers += [good[:at] + bytes((good[at] ^ 1 << rng.randrange(8),)) + good[at + 1 :]]
    answers += [rng.randbytes(rng.randrange(1, 200)) for _ in range(60)]
    answers += [b"\0" * 65536, b"\xff" * 65536, b"HTTP/1.1 " + b"1" * 65536, b"HTTP/1.1 100 x\r\n\r\n" * 5000]
    texts: list[str] = []
    while answers:
        try:
            stream = await connector(TARGET)
        except WayFailed as error:
            texts.append(str(error).strip())
            if connector.board.read("it").state:  # what looks like a refused log-in quarantines: ask again
                connector.board.change("it", lambda health: health.enable(0.0) is None)
        else:
            stream.abort()  # a bit that does not matter, such as of the bound address
        answers.pop()
    assert len(texts) > 60
    assert all(texts)


async def test_tunnels_data_that_comes_with_the_answer_is_kept(serve):
    async def parent(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly bytes")
        await writer.drain()
        await reader.read()

    stream = await routed({"it": parent_of(await serve(parent))})(TARGET)
    assert await stream.read_exactly(11) == b"early bytes"
    await stream.close()

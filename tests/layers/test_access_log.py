from __future__ import annotations

import asyncio
import logging

import pytest

from rama_ebpf.core import Authority, Extensions, LimitExceeded, Stream, User, stack
from rama_ebpf.core.notes import Note
from rama_ebpf.layers.access_log import AccessLogLayer, AccessRecord

from .conftest import Serve, echo
from .tunnel import tunnel_to


async def test_a_tunnels_line_says_who_where_why_how_much_and_how_long(
    serve: Serve, echo_target: int, caplog: pytest.LogCaptureFixture
) -> None:
    tunnel = tunnel_to(echo_target)

    async def as_tom(stream: Stream) -> object:
        stream.extensions.add(User("tom"))
        return await tunnel(stream)

    caplog.set_level(logging.INFO, "rama_ebpf.access")
    server = await serve(stack(AccessLogLayer(), as_tom))
    client = await server.open("127.0.1.9")
    assert await client.ask(b"hello") == b"hello"
    port = client.writer.get_extra_info("sockname")[1]
    client.writer.close()
    await server.outcome()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "rama_ebpf.access"]
    assert line.startswith(
        f"client=127.0.1.9:{port} listener=127.0.0.1:{server.port} user=tom target=127.0.0.1:{echo_target} "
        f"reason=eof received=5 sent=5 age=0."
    )
    assert line.endswith("relay=copy")


async def test_notes_of_layers_are_in_the_line_and_a_peers_text_cannot_forge_fields() -> None:
    extensions = Extensions()
    for key, value in (("sni", "a.test"), ("agent", 'x" reason=eof\n')):
        extensions.add(Note(key, value))
    notes = tuple(extensions.all(Note))
    record = AccessRecord(None, None, "", None, "done", 1, 2, 0.5, error="e", notes=notes)
    assert str(record) == (
        'client=unix reason=done received=1 sent=2 age=0.500 sni=a.test agent="x\\" reason=eof\\n" error=e'
    )


async def test_reason_of_an_error_is_its_kind(serve: Serve) -> None:
    records: list[AccessRecord] = []

    async def refuse(stream: Stream) -> None:
        raise LimitExceeded("too much")

    server = await serve(stack(AccessLogLayer(records.append), refuse))
    await server.open()
    await server.outcome()
    assert (records[0].reason, records[0].error) == ("limit", "too much")


async def test_a_bug_in_a_service_is_named(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    records: list[AccessRecord] = []

    async def broken(stream: Stream) -> None:
        raise KeyError("oops")

    server = await serve(stack(AccessLogLayer(records.append), broken))
    await server.open()
    await server.outcome()
    assert records[0].reason == "failed: KeyError"


async def test_a_drain_that_cuts_says_so(serve: Serve, echo_target: int) -> None:
    records: list[AccessRecord] = []
    server = await serve(stack(AccessLogLayer(records.append), tunnel_to(echo_target)))
    client = await server.open()
    assert await client.ask(b"live") == b"live"
    draining = asyncio.create_task(server.server.drain(0.3))
    await asyncio.sleep(0)
    assert await client.ask(b"still live") == b"still live"  # the drain waits
    assert await draining == 1
    assert records[0].reason == "cut: drain deadline"
    assert records[0].received == records[0].sent == 14
    assert await client.ended() == "reset"


async def test_text_that_a_client_chose_cannot_forge_a_line(serve: Serve) -> None:
    records: list[AccessRecord] = []

    async def hostile(stream: Stream) -> str:
        stream.extensions.add(User('a\nclient=1.2.3.4 "\x1b[2J'))
        stream.extensions.add(Authority("x y", 1))
        return await echo(stream)

    server = await serve(stack(AccessLogLayer(records.append), hostile))
    (await server.open()).writer.close()
    await server.outcome()
    line = str(records[0])
    assert "\n" not in line
    assert "\x1b" not in line
    assert r'user="a\nclient=1.2.3.4 \"\u001b[2J" target="x y:1"' in line

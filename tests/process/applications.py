"""Applications that workers load in the tests. They are imported in the workers, by name."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

from rama_ebpf.core import Lifecycle, PolicyDenied, ProtocolError, Service, Stage, Stream, stack
from rama_ebpf.layers.concurrency import ConcurrencyLimitLayer
from rama_ebpf.layers.metrics import MetricsLayer
from rama_ebpf.layers.strikes import StrikeLayer
from rama_ebpf.process import Application, WorkerContext
from rama_ebpf.services.tls import CertificateStore, KeyPair, ServerTls, TicketKeys, TlsParameters, TlsTerminateLayer


async def echo(stream: Stream) -> None:
    """Send back what comes until EOF."""
    while data := await stream.read():
        await stream.write(data)


def talk(context: WorkerContext) -> Service[Stream, None]:
    """Answer lines: ``who`` (worker and pid), ``params``, ``secret``, ``ask …`` (of the supervisor), ``garble …`` (the
    channel), ``hang``, else echo."""

    async def serve(stream: Stream) -> None:
        while line := await stream.read():
            word, _, rest = line.decode().strip().partition(" ")
            if word == "who":
                answer: object = {"worker": context.worker, "pid": os.getpid()}
            elif word == "params":
                answer = context.params
            elif word == "secret":
                answer = context.secret.hex()
            elif word == "ask":
                try:
                    answer = await context.channel.request(rest, {"from": context.worker})
                except Exception as error:  # noqa: BLE001  # the test wants to see whatever it is
                    answer = {"error": str(error)}
            elif word == "garble":
                context.channel._writer.write(rest.encode() + b"\n")  # type: ignore[union-attr]
                answer = "done"
            elif word == "hang":
                await stream.write(b'"hanging"\n')
                time.sleep(1000)  # noqa: ASYNC251  # a service that blocks its event loop is what is tested
            elif word == "resolve":
                answer = [str(row[4][0]) for row in await asyncio.get_running_loop().getaddrinfo(rest, 80)]
            else:
                answer = line.decode()
            await stream.write(json.dumps(answer).encode() + b"\n")

    return serve


def resuming(context: WorkerContext) -> Service[Stream, None]:
    """TLS that says who serves and whether the session was resumed; ``params`` are chain and key."""
    settings = ServerTls(ticket_keys=TicketKeys(context.secret))
    pair = KeyPair(Path(str(context.params["chain"])), Path(str(context.params["key"])))

    async def say(stream: Stream) -> None:
        resumed = stream.extensions.require(TlsParameters).resumed
        await stream.write(
            json.dumps({"worker": context.worker, "pid": os.getpid(), "resumed": resumed}).encode() + b"\n"
        )

    return stack(TlsTerminateLayer(CertificateStore.of_files(settings, pair)), say)


def two_services(context: WorkerContext) -> Application:
    """A different service for each listener."""

    async def hello(stream: Stream) -> None:
        await stream.write(b"hello\n")

    return Application({"echo": echo, "hello": hello})


def measured(context: WorkerContext) -> Service[Stream, None]:
    """``talk`` behind the metrics layer; five bytes are the handshake, and ``fail`` is one that fails."""
    inner = talk(context)

    async def serve(stream: Stream) -> None:
        word = await stream.read_exactly(5)
        if word == b"fail\n":
            raise ProtocolError("asked for")
        Lifecycle.of(stream.extensions).reached(Stage.ESTABLISHED)
        await inner(stream)

    return stack(MetricsLayer(), serve)


def broken(context: WorkerContext) -> Service[Stream, None]:
    """Cannot be made."""
    raise KeyError("no such setting")


def dies_while_loading(context: WorkerContext) -> Service[Stream, None]:
    """Takes its whole process down."""
    os.kill(os.getpid(), signal.SIGKILL)
    return echo


def broken_from_the_second_start_on(context: WorkerContext) -> Service[Stream, None]:
    """Works once per worker; for back-off and failed reloads."""
    marker = Path(str(context.params["directory"])) / f"started-{context.worker}"
    if marker.exists():
        raise RuntimeError("will not start again")
    marker.touch()
    return talk(context)


not_a_service = 42


class Refuse:
    """A layer of one's own: refuses whoever begins with ``refuse``."""

    accepts = Stream

    def __call__(self, inner: Service[Stream, object]) -> Service[Stream, object]:
        async def serve(stream: Stream) -> object:
            await stream.fill()
            if stream.buffered.startswith(b"refuse"):
                raise PolicyDenied("you asked for it", rule="refuse")
            return await inner(stream)

        return serve


def strict(context: WorkerContext) -> Service[Stream, object]:
    """Two strikes for ``nonsense``, and the source is out."""

    async def serve(stream: Stream) -> None:
        word = await stream.read()
        if word == b"nonsense":
            raise ProtocolError("nonsense")
        await stream.write(word)

    return stack(StrikeLayer(context.policy, strikes=2), serve)


def limited(context: WorkerContext) -> Service[Stream, None]:
    """``talk`` to so many clients at once, over all workers."""
    limit = int(str(context.params["limit"]))
    return stack(ConcurrencyLimitLayer(limit, shared=context.shared), talk(context))

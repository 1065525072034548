"""Fuzz targets for the SOCKS machines: each takes bytes and raises AssertionError if a guarantee does not hold.

What is legal is written down here a second time, from the RFCs and apart from the code under test.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address

from rama_ebpf.core.address import Authority, SocketAddress
from rama_ebpf.core.auth import Credentials
from rama_ebpf.core.errors import AuthFailed, ProtocolError
from rama_ebpf.services.socks5.client_machine import MAX_REPLY, ClientMachine, ClientState, Granted, Refused
from rama_ebpf.services.socks5.machine import MAX_MESSAGE, Request, ServerMachine, State
from rama_ebpf.services.socks5.wire import (
    Command,
    MalformedAddress,
    Method,
    Reply,
    decode_datagram,
    encode_datagram,
)

__all__ = ["TARGETS", "client", "datagram", "server"]

_ADDRESS = rb"(?:\x01.{6}|\x04.{18})"
_LEGAL_SERVER_OUTPUT = re.compile(
    rb"(?:"
    rb"\x05\xff"  # no acceptable method, the end
    rb"|\x05\x00(?P<reply>\x05[\x00-\x08]\x00" + _ADDRESS + rb"){0,2}"
    rb"|\x05\x02(?:\x01\x01|\x01\x00(?:\x05[\x00-\x08]\x00" + _ADDRESS + rb"){0,2})?"
    rb"|(?:\x00[\x5a\x5b].{6}){1,2}"  # SOCKS4
    rb")?",
    re.DOTALL,
)
_METHODS = ((Method.NONE,), (Method.PASSWORD,), (Method.PASSWORD, Method.NONE), (Method.NONE, Method.PASSWORD))
_BOUND = (None, SocketAddress(ip_address("198.18.0.1"), 4711), SocketAddress(ip_address("2001:db8::1"), 4711))


def server(data: bytes) -> None:
    """The first three bytes are the server's side (configuration and decisions), the rest is what the client sends."""
    if len(data) < 3:
        return
    config, decision, chunk = data[0], data[1], data[2] % 8 + 1
    sent = data[3:]
    whole = list(_serve(config, decision, sent, len(sent) or 1))
    assert list(_serve(config, decision, sent, chunk)) == whole, "how bytes are cut into segments must not matter"


def _serve(config: int, decision: int, sent: bytes, chunk: int) -> Iterator[object]:
    """Drive a machine as the service does; yield all that it says and takes."""
    commands = [command for command in Command if config >> 2 & command]
    machine = ServerMachine(_METHODS[config & 3], commands=commands, socks4=bool(config & 16))
    out = b""
    taken = 0
    arrived = 0
    requested = False
    while machine.state in (State.START, State.CREDENTIALS, State.REQUEST):
        unread = sent[taken:arrived]
        failure: Exception | None = None
        event, used = None, 0
        try:
            event, used = machine.receive(unread)
        except (ProtocolError, AuthFailed) as error:
            failure = error
        if failure is not None:
            out += machine.data_to_send()
            assert machine.state is State.CLOSED
            assert isinstance(failure, AuthFailed) or out.endswith(failure.wire)
            yield type(failure), str(failure)
            break
        assert 0 <= used <= len(unread)
        if event is None:
            assert used == 0
            assert len(unread) < MAX_MESSAGE, "a message must be decided within its bound"
            if arrived == len(sent):
                break
            arrived = min(len(sent), arrived + chunk)
            continue
        assert used > 0
        taken += used
        yield event, used
        if isinstance(event, Credentials):
            if decision & 1:
                machine.accept()
            else:
                machine.refuse()
        elif isinstance(event, Request):
            requested = True
            _answer(machine, event, decision)
        out += machine.data_to_send()
    if requested:
        _was_legal(sent[:taken], commands)
    assert machine.data_to_send() == b""
    assert _LEGAL_SERVER_OUTPUT.fullmatch(out), out.hex(" ")
    _closed_means_told(machine, sent, out)
    yield machine.state, out, taken


def _answer(machine: ServerMachine, request: Request, decision: int) -> None:
    reply = Reply((decision >> 1) % 9)
    bound = _BOUND[(decision >> 5) % 3]
    if request.command is Command.BIND and decision & 1:
        machine.reply(Reply.SUCCEEDED, bound, listening=True)
        assert machine.state is State.BOUND
    machine.reply(reply, bound)
    assert machine.state is (State.OPEN if reply is Reply.SUCCEEDED else State.CLOSED)


def _was_legal(taken: bytes, commands: list[Command]) -> None:
    """Check that a handshake which came as far as a request is what the RFCs describe, to the last byte."""
    if taken[0] == 4:
        assert taken[1] in commands
        assert taken[1] in (1, 2)
        user, *name = taken[8:-1].split(b"\0")
        named = taken[4:7] == b"\0\0\0" and taken[7] != 0
        assert taken[-1] == 0
        assert len(user) <= 255
        assert len(name) == named
        assert all(1 <= len(field) <= 255 for field in name)
        return
    assert taken[0] == 5
    assert taken[1] >= 1
    rest = taken[2 + taken[1] :]
    if rest[0] == 1:
        rest = rest[2 + rest[1] :]
        rest = rest[1 + rest[0] :]
    assert rest[0] == 5
    assert rest[1] in commands
    assert rest[2] == 0
    assert len(rest) == {1: 10, 3: 7 + rest[4], 4: 22}[rest[3]]
    assert rest[3] != 3 or rest[4] >= 1


def _closed_means_told(machine: ServerMachine, sent: bytes, out: bytes) -> None:
    """A client that spoke SOCKS and is to be closed has been told why; the last thing it is told is a refusal."""
    if machine.state is State.CLOSED and sent[0] == 5:
        assert (
            out[-2:] == b"\x05\xff"
            or out[-2:] == b"\x01\x01"
            or re.search(rb"\x05[\x01-\x08]\x00" + _ADDRESS + rb"\Z", out, re.DOTALL)
        )
    if machine.state is State.OPEN:
        assert out.startswith((b"\x05\x00", b"\x05\x02\x01\x00", b"\x00\x5a"))


def client(data: bytes) -> None:
    """The first two bytes say what our client wants, the rest is what a server sends it."""
    if len(data) < 2:
        return
    whole = list(_ask(data[0], data[2:], len(data)))
    assert list(_ask(data[0], data[2:], data[1] % 8 + 1)) == whole, "how bytes are cut into segments must not matter"


def _ask(config: int, sent: bytes, chunk: int) -> Iterator[object]:
    command = Command(config % 3 + 1)
    target = (Authority.of("example.test", 80), Authority.of("198.18.0.1", 80))[config >> 2 & 1]
    machine = ClientMachine(command, target, Credentials("tom", "secret") if config & 8 else None)
    out = machine.data_to_send()
    taken = arrived = 0
    while machine.state not in (ClientState.OPEN, ClientState.CLOSED):
        unread = sent[taken:arrived]
        failure: Exception | None = None
        granted, used = None, 0
        try:
            granted, used = machine.receive(unread)
        except (ProtocolError, AuthFailed, Refused) as error:
            failure = error
        if failure is not None:
            assert machine.state is ClientState.CLOSED
            yield type(failure), str(failure)
            break
        assert 0 <= used <= len(unread)
        if not used:
            assert granted is None
            assert len(unread) < MAX_REPLY
            if arrived == len(sent):
                break
            arrived = min(len(sent), arrived + chunk)
            continue
        taken += used
        assert granted is None or isinstance(granted, Granted)
        yield granted, used
        out += machine.data_to_send()
    assert b"secret" not in out or sent.startswith(b"\x05\x02"), "a password goes only where it was asked for"
    yield machine.state, out, taken


def datagram(data: bytes) -> None:
    """The bytes are one UDP datagram; what is understood reads the same after it is encoded again."""
    try:
        target, start = decode_datagram(data)
    except MalformedAddress:
        return
    assert data[:3] == b"\0\0\0"
    assert 10 <= start <= len(data) or (start >= 8 and isinstance(target.host, str))
    again, begin = decode_datagram(encode_datagram(target, data[start:]))
    assert again == target
    assert encode_datagram(target, data[start:])[begin:] == data[start:]


TARGETS: dict[str, Callable[[bytes], None]] = {"server": server, "client": client, "datagram": datagram}

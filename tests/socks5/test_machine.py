"""The machines by themselves, byte by byte: a playbook says what comes in, what is understood and what goes out."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from rama_ebpf.core import AuthFailed, Authority, Credentials, ProtocolError, SocketAddress
from rama_ebpf.services.socks5 import Command, Method, Reply, Request, ServerMachine
from rama_ebpf.services.socks5.client_machine import TRANSITIONS as CLIENT_TRANSITIONS
from rama_ebpf.services.socks5.client_machine import ClientMachine, ClientState, Refused
from rama_ebpf.services.socks5.machine import MAX_MESSAGE, TRANSITIONS, State
from rama_ebpf.services.socks5.wire import decode_address, encode_address


def play(machine: ServerMachine | ClientMachine, data: bytes) -> list[object]:
    """Feed ``data`` byte by byte until the machine wants nothing more; return the events."""
    events: list[object] = []
    unread = b""
    for byte in data:
        unread += bytes((byte,))
        event, used = machine.receive(unread)
        unread = unread[used:]
        if event is not None:
            events.append(event)
    assert unread == b""
    return events


def test_playbook_of_a_connect_with_password():
    machine = ServerMachine((Method.PASSWORD,))
    assert play(machine, b"\x05\x02\x00\x02")[0].chosen is Method.PASSWORD
    assert machine.data_to_send() == b"\x05\x02"
    assert play(machine, b"\x01\x03tom\x06secret") == [Credentials("tom", "secret")]
    assert machine.data_to_send() == b"", "the verdict is the caller's"
    machine.accept()
    assert machine.data_to_send() == b"\x01\x00"
    assert play(machine, b"\x05\x01\x00\x03\x0cexample.test\x01\xbb") == [
        Request(5, Command.CONNECT, Authority("example.test", 443))
    ]
    assert machine.owes_reply
    machine.reply(Reply.SUCCEEDED, SocketAddress(ip_address("2001:db8::1"), 4711))
    assert machine.data_to_send() == b"\x05\x00\x00\x04" + ip_address("2001:db8::1").packed + b"\x12\x67"
    assert machine.state is State.OPEN


def test_playbook_of_bind():
    machine = ServerMachine(commands=[Command.BIND])
    play(machine, b"\x05\x01\x00")
    play(machine, b"\x05\x02\x00\x01\xc6\x12\x00\x01\x00\x14")
    machine.data_to_send()
    machine.reply(Reply.SUCCEEDED, SocketAddress(ip_address("198.18.0.2"), 1), listening=True)
    assert machine.data_to_send() == b"\x05\x00\x00\x01\xc6\x12\x00\x02\x00\x01"
    assert machine.owes_reply
    machine.reply(Reply.TTL_EXPIRED)
    assert machine.data_to_send() == b"\x05\x06\x00\x01" + bytes(6)
    assert machine.state is State.CLOSED


def test_bytes_behind_a_message_are_never_taken():
    machine = ServerMachine()
    assert machine.receive(b"\x05\x01\x00\x05\x01rest")[1] == 3
    assert machine.receive(b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50tunnel data")[1] == 10


@pytest.mark.parametrize(
    ("wrong", "state"),
    [
        (lambda machine: machine.accept(), State.START),
        (lambda machine: machine.refuse(), State.START),
        (lambda machine: machine.reply(Reply.SUCCEEDED), State.START),
        (lambda machine: machine.receive(b"x"), State.OPEN),
        (lambda machine: machine.receive(b"x"), State.CLOSED),
        (lambda machine: machine.receive(b"x"), State.VERDICT),
        (lambda machine: machine.reply(Reply.SUCCEEDED), State.OPEN),
        (lambda machine: machine.refuse(), State.REPLY),
    ],
)
def test_what_the_table_does_not_list_is_a_mistake_of_the_caller(wrong, state):
    machine = ServerMachine()
    machine.state = state
    with pytest.raises(RuntimeError):
        wrong(machine)
    assert machine.state is state


def test_tables_lead_every_state_to_an_end():
    both = ((TRANSITIONS, {State.OPEN, State.CLOSED}), (CLIENT_TRANSITIONS, {ClientState.OPEN, ClientState.CLOSED}))
    for table, ends in both:
        for state, moves in table.items():
            assert bool(moves) is (state not in ends)
            seen, todo = set(), [state]
            while todo:
                here = todo.pop()
                seen.add(here)
                todo += [there for there in table[here].values() if there not in seen]
            assert seen & ends


def test_longest_messages_fit_the_bound():
    longest = b"\x04\x01\x00\x50\x00\x00\x00\x01" + b"u" * 255 + b"\0" + b"d" * 255 + b"\0"
    assert len(longest) == MAX_MESSAGE
    event, used = ServerMachine().receive(longest)
    assert isinstance(event, Request)
    assert used == MAX_MESSAGE


@pytest.mark.parametrize(
    "authority",
    ["192.0.2.1:1", "[2001:db8::1]:65535", "example.test:0", "xn--bcher-kva.example:80", "bücher.example:80"],
)
def test_address_reads_as_it_was_written(authority):
    host, _, port = authority.rpartition(":")
    written = encode_address(Authority.of(host, int(port)))
    assert decode_address(written) == (Authority.of(host, int(port)), len(written))
    for length in range(len(written)):
        assert decode_address(written[:length]) is None


def test_client_playbook_with_password():
    machine = ClientMachine(Command.CONNECT, Authority("example.test", 443), Credentials("tom", "secret"))
    assert machine.data_to_send() == b"\x05\x02\x00\x02"
    play(machine, b"\x05\x02")
    assert machine.data_to_send() == b"\x01\x03tom\x06secret"
    play(machine, b"\x01\x00")
    assert machine.data_to_send() == b"\x05\x01\x00\x03\x0cexample.test\x01\xbb"
    (granted,) = play(machine, b"\x05\x00\x00\x01\xc6\x12\x00\x01\x00\x50")
    assert granted.bound == Authority.of("198.18.0.1", 80)
    assert machine.state is ClientState.OPEN


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"\x05\xff", AuthFailed),
        (b"\x05\x02", ProtocolError),  # not offered
        (b"\x05\x01", ProtocolError),
        (b"HTTP", ProtocolError),
        (b"\x04\x00", ProtocolError),
        (b"\x05\x00\x05\x05", Refused),
        (b"\x05\x00\x05\x63\x00\x01", Refused),
        (b"\x05\x00\x00\x00", ProtocolError),
        (b"\x05\x00\x05\x00\x00\x09", ProtocolError),
        (b"\x05\x00\x05\x00\x00\x03\x00", ProtocolError),
    ],
)
def test_client_is_not_fooled_by_a_server(answer, error):
    machine = ClientMachine(Command.CONNECT, Authority("example.test", 443))
    with pytest.raises(error):
        play(machine, answer)
    assert machine.state is ClientState.CLOSED


@pytest.mark.parametrize("credentials", [Credentials("", "x"), Credentials("x", ""), Credentials("x" * 256, "x")])
def test_credentials_that_fit_no_field_are_refused_before_anything_is_sent(credentials):
    with pytest.raises(ValueError, match="1-255 octets"):
        ClientMachine(Command.CONNECT, Authority("example.test", 443), credentials)


def test_password_is_in_no_repr():
    assert "secret" not in repr(Credentials("tom", "secret"))

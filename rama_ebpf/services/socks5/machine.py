"""The server's side of SOCKS5, SOCKS4 and SOCKS4a as a state machine: bytes in, events and bytes out.

The rules
=========
1. The machine reads one message at a time from the bytes it is shown, says how many of them it took, and holds none:
   what follows a request (data that a client sends ahead) is never touched.
2. A client's message moves the machine only along :data:`TRANSITIONS`; so does the caller's decision. What the table
   does not list is a mistake of the caller and raises RuntimeError.
3. A message that its RFC does not allow raises an error, and the reply that is due waits in ``data_to_send``. Nothing
   is read after it.
4. A message is judged when all of its bytes are there that decide: an unknown command is told from four bytes, and
   no byte that is missing can delay a refusal for ever, because every message has an upper bound (:data:`MAX_MESSAGE`).

::

    START ──Greeting──► CREDENTIALS ──► VERDICT ──accept──► REQUEST ──Request──► REPLY ──succeeded──► OPEN
      │        └────────── (method NONE) ───────────────────►            ▲        │ └──listening──► BOUND ──► OPEN
      └──Request (SOCKS4)────────────────────────────────────────────────┘        └──failed──► CLOSED
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from ...core.address import Authority, SocketAddress
from ...core.auth import Credentials
from ...core.blame import speaks_another_protocol
from ...core.errors import AuthFailed, ProtocolError
from .wire import (
    UNKNOWN_ADDRESS,
    BadName,
    Command,
    MalformedAddress,
    Method,
    Reply,
    decode_address,
    decode_domain,
    encode_address,
)

__all__ = [
    "MAX_MESSAGE",
    "Greeting",
    "Request",
    "ServerMachine",
    "State",
    "encode_reply",
]

MAX_MESSAGE: Final = 1 + 1 + 2 + 4 + 256 + 256
"""Upper bound in bytes of one client message; the longest is a SOCKS4a request with 255-octet user id and domain."""

_SOCKS4: Final = 4
_SOCKS5: Final = 5
_PASSWORD_VERSION: Final = 1
_SOCKS4_GRANTED: Final = 0x5A
_SOCKS4_REJECTED: Final = 0x5B
_SOCKS4_FIELD_MAX: Final = 255
_COMMANDS: Final = {command.value: command for command in Command}
_KNOWN_COMMANDS: Final = frozenset({*Command, 0xF0, 0xF1})  # the last two: Tor's RESOLVE and RESOLVE_PTR


@dataclass(frozen=True, slots=True)
class Greeting:
    """The methods a client offers, and the one that was chosen."""

    offered: bytes
    chosen: Method


@dataclass(frozen=True, slots=True)
class Request:
    """What the client wants: ``version`` is 4 or 5, ``user_id`` the unproven name in a SOCKS4 request."""

    version: int
    command: Command
    target: Authority
    user_id: bytes = b""


Event = Greeting | Credentials | Request


class State(enum.Enum):
    """Where the machine stands: what it waits for, from the client or from the caller."""

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is a call of Python for each look-up

    START = "greeting or SOCKS4 request due"
    CREDENTIALS = "credentials due"
    VERDICT = "caller must accept or refuse the credentials"
    REQUEST = "request due"
    REPLY = "caller must reply"
    BOUND = "caller owes the second reply to BIND"
    OPEN = "what follows is the tunnel's"
    CLOSED = "the connection must be closed"


class _Step(enum.Enum):
    __hash__ = object.__hash__
    METHOD_NONE = enum.auto()
    METHOD_PASSWORD = enum.auto()
    CREDENTIALS = enum.auto()
    ACCEPTED = enum.auto()
    REQUEST = enum.auto()
    SUCCEEDED = enum.auto()
    LISTENING = enum.auto()
    FAILED = enum.auto()


TRANSITIONS: Final[Mapping[State, Mapping[_Step, State]]] = {
    State.START: {
        _Step.METHOD_NONE: State.REQUEST,
        _Step.METHOD_PASSWORD: State.CREDENTIALS,
        _Step.REQUEST: State.REPLY,
        _Step.FAILED: State.CLOSED,
    },
    State.CREDENTIALS: {_Step.CREDENTIALS: State.VERDICT, _Step.FAILED: State.CLOSED},
    State.VERDICT: {_Step.ACCEPTED: State.REQUEST, _Step.FAILED: State.CLOSED},
    State.REQUEST: {_Step.REQUEST: State.REPLY, _Step.FAILED: State.CLOSED},
    State.REPLY: {_Step.SUCCEEDED: State.OPEN, _Step.LISTENING: State.BOUND, _Step.FAILED: State.CLOSED},
    State.BOUND: {_Step.SUCCEEDED: State.OPEN, _Step.FAILED: State.CLOSED},
    State.OPEN: {},
    State.CLOSED: {},
}


class ServerMachine:
    """One client's handshake.

    ``methods`` are those the server takes, the preferred one first; ``commands`` what it does for its clients.
    ``socks4`` admits SOCKS4 and 4a; their clients cannot prove who they are, so they are refused where ``methods``
    lacks :attr:`Method.NONE`.
    """

    def __init__(
        self,
        methods: Sequence[Method] = (Method.NONE,),
        *,
        commands: Collection[Command] = (Command.CONNECT,),
        socks4: bool = True,
    ) -> None:
        if not methods or Method.NO_ACCEPTABLE in methods:
            raise ValueError(f"methods must be one or more of NONE and PASSWORD, not {list(methods)}")
        self._methods = tuple(methods)
        self._commands = frozenset(commands)
        self._socks4 = socks4
        self._out = bytearray()
        self.state = State.START
        self.version: int | None = None

    def receive(self, data: bytes) -> tuple[Event | None, int]:
        """Read one message from the start of ``data``: return the event and the number of bytes that it took.

        Returns ``(None, 0)`` if more bytes are needed. Raises :class:`ProtocolError` or :class:`AuthFailed` with
        the reply in :meth:`data_to_send`; RuntimeError if nothing is due from the client.
        """
        state = self.state
        if state is State.START:
            parse = self._start
        elif state is State.REQUEST:
            parse = self._request
        elif state is State.CREDENTIALS:
            parse = self._credentials
        else:
            raise RuntimeError(f"nothing is due from the client: {self.state.value}")
        if not data:
            return None, 0
        try:
            return parse(data)
        except (ProtocolError, AuthFailed):
            self._go(_Step.FAILED)
            raise

    def data_to_send(self) -> bytes:
        """Return the bytes that the client is to be sent, and forget them."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def accept(self) -> None:
        """The caller has found the credentials good."""
        self._go(_Step.ACCEPTED)
        self._out += bytes((_PASSWORD_VERSION, 0))

    def refuse(self) -> None:
        """The caller has found the credentials wrong: the client is told and must be closed (RFC 1929 section 2)."""
        if self.state is not State.VERDICT:
            raise RuntimeError(f"there are no credentials to refuse: {self.state.value}")
        self._go(_Step.FAILED)
        self._out += bytes((_PASSWORD_VERSION, 1))

    @property
    def owes_reply(self) -> bool:
        """Whether the client waits for a reply that only the caller can give."""
        return self.state is State.REPLY or self.state is State.BOUND

    def reply(self, reply: Reply, bound: SocketAddress | None = None, *, listening: bool = False) -> None:
        """Answer the request with ``reply`` and our own address ``bound`` towards the target.

        ``listening`` marks the first of the two replies to BIND. Any reply but SUCCEEDED closes.
        """
        if not self.owes_reply:
            raise RuntimeError(f"there is no request to answer: {self.state.value}")
        if reply is not Reply.SUCCEEDED:
            self._go(_Step.FAILED)
        else:
            self._go(_Step.LISTENING if listening else _Step.SUCCEEDED)
        self._out += encode_reply(self.version or _SOCKS5, reply, bound)

    def _go(self, step: _Step) -> None:
        try:
            self.state = TRANSITIONS[self.state][step]
        except KeyError:
            raise RuntimeError(f"{step.name} cannot happen here: {self.state.value}") from None

    # -- one method a state in which the client speaks ---------------------------------------------------------

    def _start(self, data: bytes) -> tuple[Event | None, int]:
        self.version = data[0]
        if data[0] == _SOCKS4 and self._socks4:
            return self._request4(data)
        if data[0] != _SOCKS5:
            stray = speaks_another_protocol(data) or data[0] == _SOCKS4
            message = f"first byte {data[0]:#04x} is not a SOCKS version that is served here"
            raise ProtocolError(message, kind="wrong_protocol" if stray else None)
        if len(data) < 2 or len(data) < 2 + data[1]:
            return None, 0
        end = 2 + data[1]
        offered = data[2:end]
        for method in self._methods:
            if method in offered:
                self._go(_Step.METHOD_NONE if method is Method.NONE else _Step.METHOD_PASSWORD)
                self._out += bytes((_SOCKS5, method))
                return Greeting(offered, method), end
        wire = self._last(bytes((_SOCKS5, Method.NO_ACCEPTABLE)))
        if not offered:
            raise ProtocolError("greeting offers no authentication method at all", wire)
        raise AuthFailed(f"no acceptable authentication method among {offered.hex(' ')}", kind="auth_absent")

    def _credentials(self, data: bytes) -> tuple[Event | None, int]:
        if data[0] != _PASSWORD_VERSION:
            wire = self._last(bytes((_PASSWORD_VERSION, 1)))
            raise ProtocolError(f"authentication has version {data[0]:#04x}, RFC 1929 says 0x01", wire)
        if len(data) < 2:
            return None, 0
        middle = 2 + data[1]
        if len(data) <= middle:
            return None, 0
        end = middle + 1 + data[middle]
        if len(data) < end:
            return None, 0
        try:
            credentials = Credentials(data[2:middle].decode(), data[middle + 1 : end].decode())
        except UnicodeDecodeError:
            self._last(bytes((_PASSWORD_VERSION, 1)))
            raise AuthFailed("user name or password is not UTF-8", kind="auth_absent") from None
        self._go(_Step.CREDENTIALS)
        return credentials, end

    def _request(self, data: bytes) -> tuple[Event | None, int]:
        if data[0] != _SOCKS5:
            raise self._malformed(f"request has version {data[0]:#04x} after a SOCKS5 greeting")
        if len(data) < 4:
            return None, 0
        command = self._command(data[1])
        if data[2] != 0:
            raise self._malformed(f"reserved octet of the request is {data[2]:#04x}, not 0")
        try:
            found = decode_address(data, 3)
        except MalformedAddress as error:
            raise self._malformed_address(error) from error
        if found is None:
            return None, 0
        target, end = found
        self._go(_Step.REQUEST)
        return Request(_SOCKS5, command, target), end

    def _command(self, code: int) -> Command:
        if code not in self._commands:
            kind = "socks_command" if code in _KNOWN_COMMANDS else None
            raise self._malformed(f"command {code:#04x} is not served here", Reply.COMMAND_NOT_SUPPORTED, kind)
        return _COMMANDS[code]

    def _request4(self, data: bytes) -> tuple[Event | None, int]:
        if Method.NONE not in self._methods:
            self._last(encode_reply(_SOCKS4, Reply.NOT_ALLOWED))
            raise AuthFailed("SOCKS4 cannot authenticate", kind="auth_absent")
        if len(data) < 9:
            return None, 0
        command = self._command(data[1])
        if command is Command.UDP_ASSOCIATE:
            raise self._malformed("SOCKS4 has no UDP", Reply.COMMAND_NOT_SUPPORTED, "socks_command")
        found = self._field4(data, 8, "user id")
        if found is None:
            return None, 0
        user_id, end = found
        ip = IPv4Address(data[4:8])
        port = int.from_bytes(data[2:4], "big")
        target = Authority(ip, port)
        if 0 < int(ip) < 256:  # SOCKS4a: 0.0.0.x with x != 0 says that a domain name follows
            found = self._field4(data, end, "domain name")
            if found is None:
                return None, 0
            field, end = found
            if not field:
                raise self._malformed("zero-length domain name")
            try:
                target = Authority.of(decode_domain(field), port)
            except MalformedAddress as error:
                raise self._malformed_address(error) from error
        self._go(_Step.REQUEST)
        return Request(_SOCKS4, command, target, user_id), end

    def _field4(self, data: bytes, start: int, what: str) -> tuple[bytes, int] | None:
        """Read a field that ends with NUL; None if the NUL is still to come."""
        end = data.find(0, start, start + _SOCKS4_FIELD_MAX + 1)
        if end >= 0:
            return data[start:end], end + 1
        if len(data) - start > _SOCKS4_FIELD_MAX:
            raise self._malformed(f"SOCKS4 {what} is longer than {_SOCKS4_FIELD_MAX} octets")
        return None

    def _malformed(self, message: str, reply: Reply = Reply.GENERAL_FAILURE, kind: str | None = None) -> ProtocolError:
        return ProtocolError(message, self._last(encode_reply(self.version or _SOCKS5, reply)), kind=kind)

    def _malformed_address(self, error: MalformedAddress) -> ProtocolError:
        return self._malformed(str(error), error.reply, "socks_target" if isinstance(error, BadName) else None)

    def _last(self, wire: bytes) -> bytes:
        """Queue the last thing that this client is told."""
        self._out += wire
        return wire


def encode_reply(version: int, reply: Reply, bound: SocketAddress | None = None) -> bytes:
    """Return a reply of SOCKS4 or SOCKS5. SOCKS4 has one code for every failure and carries IPv4 addresses only."""
    address = bound or UNKNOWN_ADDRESS
    if version == _SOCKS4:
        code = _SOCKS4_GRANTED if reply is Reply.SUCCEEDED else _SOCKS4_REJECTED
        ip = address.ip if isinstance(address.ip, IPv4Address) else IPv4Address(0)
        return bytes((0, code)) + address.port.to_bytes(2, "big") + ip.packed
    return bytes((_SOCKS5, reply, 0)) + encode_address(address)

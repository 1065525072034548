"""The client's side of SOCKS5 as a state machine: bytes in, events and bytes out.

It keeps the rules of :mod:`~.machine`: one message at a time, none held, nothing behind the last one touched, and
every move along a table. A server that sends what RFC 1928 does not allow raises :class:`ProtocolError`; one that
refuses raises :class:`Refused`.

::

    METHOD ──NONE──────────────────────► REPLY ──granted──► OPEN
       └────PASSWORD──► VERDICT ──good──►  └──first of BIND──► PEER ──granted──► OPEN
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ...core.address import Authority
from ...core.auth import Credentials
from ...core.errors import AuthFailed, ProtocolError, RamaError
from .wire import Command, MalformedAddress, Method, Reply, decode_address, encode_address

__all__ = ["MAX_REPLY", "ClientMachine", "ClientState", "Granted", "Refused"]

MAX_REPLY: Final = 3 + 1 + 1 + 255 + 2
"""Upper bound in bytes of one server message."""

_VERSION: Final = 5
_PASSWORD_VERSION: Final = 1


class Refused(RamaError):
    """The server answered the request with another code than success; ``reply`` is that code (a number that RFC 1928
    does not assign counts as a general failure)."""

    kind = "refused"

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"the SOCKS5 proxy says: {reply.name.lower().replace('_', ' ')}")
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Granted:
    """The server has done what was asked; ``bound`` is BND.ADDR with BND.PORT. BIND yields two of these."""

    bound: Authority


class ClientState(enum.Enum):
    """What the client waits for."""

    METHOD = "method selection due"
    VERDICT = "verdict on the credentials due"
    REPLY = "reply due"
    PEER = "second reply to BIND due"
    OPEN = "what follows is the tunnel's"
    CLOSED = "the connection must be closed"


class _Step(enum.Enum):
    METHOD_NONE = enum.auto()
    METHOD_PASSWORD = enum.auto()
    ACCEPTED = enum.auto()
    GRANTED = enum.auto()
    LISTENING = enum.auto()
    FAILED = enum.auto()


TRANSITIONS: Final[Mapping[ClientState, Mapping[_Step, ClientState]]] = {
    ClientState.METHOD: {
        _Step.METHOD_NONE: ClientState.REPLY,
        _Step.METHOD_PASSWORD: ClientState.VERDICT,
        _Step.FAILED: ClientState.CLOSED,
    },
    ClientState.VERDICT: {_Step.ACCEPTED: ClientState.REPLY, _Step.FAILED: ClientState.CLOSED},
    ClientState.REPLY: {
        _Step.GRANTED: ClientState.OPEN,
        _Step.LISTENING: ClientState.PEER,
        _Step.FAILED: ClientState.CLOSED,
    },
    ClientState.PEER: {_Step.GRANTED: ClientState.OPEN, _Step.FAILED: ClientState.CLOSED},
    ClientState.OPEN: {},
    ClientState.CLOSED: {},
}


class ClientMachine:
    """One handshake with a server: ``command`` for ``target``, proving who we are with ``credentials`` if asked.

    Raises ValueError for a target or credentials that do not fit into their fields.
    """

    def __init__(self, command: Command, target: Authority, credentials: Credentials | None = None) -> None:
        self.state = ClientState.METHOD
        self._bind = command is Command.BIND
        self._request = bytes((_VERSION, command, 0)) + encode_address(target)
        self._login = None if credentials is None else _encode_credentials(credentials)
        offered = (Method.NONE,) if credentials is None else (Method.NONE, Method.PASSWORD)
        self._out = bytearray((_VERSION, len(offered), *offered))

    def data_to_send(self) -> bytes:
        """Return the bytes that the server is to be sent, and forget them."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def receive(self, data: bytes) -> tuple[Granted | None, int]:
        """Read one message from the start of ``data``: return what was granted, if it was that message, and the
        number of bytes it took (0: more are needed).

        Raises :class:`ProtocolError`, :class:`AuthFailed` or :class:`Refused`; RuntimeError if nothing is due.
        """
        parse = {
            ClientState.METHOD: self._method,
            ClientState.VERDICT: self._verdict,
            ClientState.REPLY: self._reply,
            ClientState.PEER: self._reply,
        }.get(self.state)
        if parse is None:
            raise RuntimeError(f"nothing is due from the server: {self.state.value}")
        if not data:
            return None, 0
        try:
            return parse(data)
        except (ProtocolError, AuthFailed, Refused):
            self._go(_Step.FAILED)
            raise

    def _go(self, step: _Step) -> None:
        self.state = TRANSITIONS[self.state][step]

    def _method(self, data: bytes) -> tuple[None, int]:
        if data[0] != _VERSION:
            raise ProtocolError(f"server answers the greeting with version {data[0]:#04x}: it speaks no SOCKS5")
        if len(data) < 2:
            return None, 0
        if data[1] == Method.NONE:
            self._go(_Step.METHOD_NONE)
            self._out += self._request
        elif data[1] == Method.PASSWORD and self._login is not None:
            self._go(_Step.METHOD_PASSWORD)
            self._out += self._login
        elif data[1] == Method.NO_ACCEPTABLE:
            raise AuthFailed("the SOCKS5 proxy takes none of the authentication methods that we have")
        else:
            raise ProtocolError(f"server chose method {data[1]:#04x}, which was not offered")
        return None, 2

    def _verdict(self, data: bytes) -> tuple[None, int]:
        if data[0] != _PASSWORD_VERSION:
            raise ProtocolError(f"authentication has version {data[0]:#04x}, RFC 1929 says 0x01")
        if len(data) < 2:
            return None, 0
        if data[1] != 0:
            raise AuthFailed("the SOCKS5 proxy refuses our user name or password")
        self._go(_Step.ACCEPTED)
        self._out += self._request
        return None, 2

    def _reply(self, data: bytes) -> tuple[Granted | None, int]:
        if data[0] != _VERSION:
            raise ProtocolError(f"reply has version {data[0]:#04x}")
        if len(data) < 2:
            return None, 0
        if data[1] != Reply.SUCCEEDED:
            # The code decides; what stands behind it (often cut short by a close) does not matter any more.
            raise Refused(Reply(data[1]) if data[1] in Reply.__members__.values() else Reply.GENERAL_FAILURE)
        if len(data) < 4:
            return None, 0
        try:
            found = decode_address(data, 3)
        except MalformedAddress as error:
            raise ProtocolError(f"reply is malformed: {error}") from error
        if found is None:
            return None, 0
        bound, end = found
        self._go(_Step.LISTENING if self._bind and self.state is ClientState.REPLY else _Step.GRANTED)
        return Granted(bound), end


def _encode_credentials(credentials: Credentials) -> bytes:
    name, password = credentials.username.encode(), credentials.password.encode()
    if not 1 <= len(name) <= 255 or not 1 <= len(password) <= 255:
        raise ValueError("user name and password must have 1-255 octets each (RFC 1929)")
    return bytes((_PASSWORD_VERSION, len(name))) + name + bytes((len(password),)) + password

"""What is to be known of a tunnel of the wire relay that outlives the process that has made it.

Its worker tells it when the tunnel is taken over; whoever goes on with the tunnel reads it. It comes from a process
that parses bytes from the network, so it has a schema, and nothing in it changes whose packets are translated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ..core.address import Authority, Endpoint, SocketAddress
from ..core.auth import User
from ..core.client import ClientAddress, ListenerName, LocalAddress, client_address
from ..core.extensions import Extensions
from ..core.logfmt import logfmt
from ..core.notes import Note
from ..core.stream import Stream
from .options import TunnelLimits
from .report import CloseReason

__all__ = ["STORY_BYTES", "Story"]

STORY_BYTES: Final = 1024
"""How long a story may be; a tunnel that has a longer one does not outlive its server."""

_Text = Annotated[str, Meta(max_length=STORY_BYTES)]
_Count = Annotated[int, Meta(ge=0, le=2**62)]
_Seconds = Annotated[float, Meta(ge=0)]


class Story(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``began`` is by CLOCK_MONOTONIC in seconds, ``received`` and ``sent`` are bytes from and to the client before
    there was a tunnel. ``upstream`` is the address that was dialled, ``target`` what the client has asked for."""

    began: _Seconds
    listener: _Text = ""
    client: _Text = ""
    local: _Text = ""
    upstream: _Text = ""
    user: _Text = ""
    target: _Text = ""
    received: _Count = 0
    sent: _Count = 0
    idle: _Seconds | None = None
    total: _Seconds | None = None
    notes: dict[_Text, _Text] = {}

    @classmethod
    def of(cls, client: Stream, upstream: SocketAddress | None, limits: TunnelLimits, owed: int, began: float) -> Story:
        """Tell it of a tunnel of ``client`` that is about to begin, to which so many bytes are said first."""
        extensions = client.extensions
        listener, user, target = extensions.get(ListenerName), extensions.get(User), extensions.get(Authority)
        return cls(
            began=began,
            listener="" if listener is None else listener.name,
            client=_text(client_address(client) or client.peer),
            local=_text(client.local),
            upstream=_text(upstream),
            user="" if user is None else user.name,
            target=_text(target),
            received=client.bytes_received,
            sent=client.bytes_sent + owed,
            idle=limits.idle,
            total=limits.total,
            notes={note.key: note.value for note in extensions.all(Note)},
        )

    def pack(self) -> bytes:
        """Return it as it is sent; b"" if it is too long."""
        data = msgspec.json.encode(self)
        return data if len(data) <= STORY_BYTES else b""

    @classmethod
    def unpack(cls, data: bytes) -> Story:
        """Raises ValueError."""
        story = _decode(data)
        for text in (story.client, story.local, story.upstream):
            _address(text)
        if story.target:
            _authority(story.target)
        return story

    @property
    def limits(self) -> TunnelLimits:
        """What bounds the tunnel."""
        return TunnelLimits(self.idle, self.total)

    @property
    def source(self) -> SocketAddress | None:
        """The client's address."""
        return _address(self.client)

    @property
    def dialled(self) -> SocketAddress | None:
        """The address of its other end."""
        return _address(self.upstream)

    @property
    def listened(self) -> SocketAddress | None:
        """Where the client has connected to."""
        return _address(self.local)

    def tell(self, extensions: Extensions) -> None:
        """Add what it says of the client."""
        values: Iterable[tuple[Callable[..., object], object]] = (
            (ClientAddress, self.source),
            (LocalAddress, self.listened),
            (ListenerName, self.listener),
            (User, self.user),
        )
        for kind, value in values:
            if value:
                extensions.add(kind(value))
        if self.target:
            extensions.add(_authority(self.target))
        for key, note in self.notes.items():
            extensions.add(Note(key, note))

    def line(self, reason: CloseReason, moved: tuple[int, int], now: float) -> str:
        """Return what a log says of its end, as the access log has it."""
        return logfmt(
            [
                ("client", self.client),
                ("listener", self.local),
                ("user", self.user),
                ("target", self.target),
                ("reason", reason.value),
                ("received", self.received + moved[0]),
                ("sent", self.sent + moved[1]),
                ("age", f"{now - self.began:.3f}"),
                ("relay", "wire"),
                *self.notes.items(),
            ]
        )


_decode: Final = msgspec.json.Decoder(Story).decode


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _address(text: str) -> SocketAddress | None:
    return Endpoint.of(text).address if text and not text.startswith("unix:") else None


def _authority(text: str) -> Authority:
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdigit()):
        raise ValueError("a target without a port")
    return Authority.of(host, int(port))

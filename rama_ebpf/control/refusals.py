"""What services have refused, and why: told by workers, kept by the server for ``why``.

A worker tells of each refusal up to a rate, and how many it left out. It parses bytes from the network, so the server
believes none of it: a schema with sizes, so many of one client, so many clients.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ..core.address import IPAddress, SocketAddress, unmap
from ..core.blame import BLAME
from ..core.bucket import TokenBucket
from ..core.first_bytes import Refused
from ..core.request_log import RequestRecord
from ..layers.access_log import AccessRecord
from ..process import WorkerObserver, WorkerProcess
from ..process.channel import Channel
from ..process.plan import Json

__all__ = ["KeptRefusal", "RefusalBook", "RefusalReporter", "TellsRefusals", "new_id"]

_RATE: Final = 50.0
_BURST: Final = 200
_MOST_CLIENTS: Final = 1024
_OF_ONE_CLIENT: Final = 16
_TEXT: Final = 240
_NO_REFUSALS: Final = {
    "done",
    "peer_closed",
    "client_reset",
    "io_error",
    "idle_timeout",
    "total_timeout",
    "tunnel_timeout",
}
"""Ends that nobody has decided against the client."""


class TellsRefusals(msgspec.Struct, forbid_unknown_fields=True):
    """What a worker tells of one refusal; ``missed`` is how many it has left out since the last."""

    client: Annotated[str, Meta(min_length=2, max_length=64)]
    kind: Annotated[str, Meta(min_length=1, max_length=64)]
    listener: Annotated[str, Meta(max_length=80)] = ""
    id: Annotated[str, Meta(max_length=16)] = ""
    rule: Annotated[str, Meta(max_length=_TEXT)] = ""
    user: Annotated[str, Meta(max_length=_TEXT)] = ""
    target: Annotated[str, Meta(max_length=_TEXT)] = ""
    text: Annotated[str, Meta(max_length=_TEXT)] = ""
    status: Annotated[int, Meta(ge=0, le=999)] = 0
    missed: Annotated[int, Meta(ge=0, le=2**53)] = 0


@dataclass(frozen=True, slots=True)
class KeptRefusal:
    """One refusal. ``when`` is the wall clock in seconds, ``id`` what the client was told ("" if nothing), ``status``
    that of HTTP or 0; who is to blame for the ``kind`` stands in :mod:`~rama_ebpf.core.blame`."""

    when: float
    client: IPAddress
    listener: str
    kind: str
    id: str
    rule: str
    user: str
    target: str
    text: str
    status: int

    def json(self) -> Json:
        """As it is shown to programs."""
        row = BLAME.get(self.kind)
        return {
            "when": self.when,
            "client": str(self.client),
            "listener": self.listener,
            "kind": self.kind,
            "event": "" if row is None else row.event,
            "blame": "" if row is None else row.blame.value,
            "id": self.id,
            "rule": self.rule,
            "user": self.user,
            "target": self.target,
            "text": self.text,
            "status": self.status,
        }


def new_id() -> str:
    """Return a short id for a refusal: eight hexadecimal digits."""
    return secrets.token_hex(4)


class RefusalReporter:
    """In a worker: tells the server."""

    def __init__(self, channel: Channel, clock: Callable[[], float] = time.monotonic) -> None:
        self._channel = channel
        self._clock = clock
        self._bucket = TokenBucket(_RATE, _BURST)
        self._missed = 0

    def connection(self, record: AccessRecord) -> None:
        """A connection has ended."""
        if record.error and _is_refusal(record.reason):
            self._tell(
                record.client,
                record.reason,
                listener=str(record.listener or ""),
                user=record.user,
                target=str(record.target or ""),
                text=record.error,
            )

    def request(self, record: RequestRecord) -> None:
        """A request has ended."""
        if (record.error or record.rule or record.reason in BLAME) and _is_refusal(record.reason):
            self._tell(
                record.client,
                record.reason,
                listener=str(record.listener or ""),
                id=next((note.value for note in record.notes if note.key == "refusal"), ""),
                rule=record.rule,
                user=record.user,
                target=record.target,
                text=record.error,
                status=record.status,
            )

    def first_bytes(self, why: Refused, client: SocketAddress | None, listener: str | None, _count: int) -> None:
        """A connection is refused by its first bytes."""
        if _is_refusal(why.kind):
            self._tell(client, why.kind, listener=listener or "", text=why.text)

    def _tell(self, client: SocketAddress | None, kind: str, *, status: int = 0, **texts: str) -> None:
        if client is None:
            return  # of a Unix socket
        if self._bucket.take(self._clock()):
            self._missed += 1
            return
        short = {name: text[:_TEXT] for name, text in texts.items() if text}
        missed, self._missed = self._missed, 0
        self._channel.notify(
            "refused", {"client": str(client.ip), "kind": kind[:64], **short, "status": status, "missed": missed}
        )


def _is_refusal(reason: str) -> bool:
    return reason not in _NO_REFUSALS and not reason.startswith("cut")


class RefusalBook(WorkerObserver):
    """In the server: the last refusals of each client, of the clients that were refused last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[IPAddress, deque[KeptRefusal]] = OrderedDict()
        self.missed = 0
        """How many workers have not told of, because there were too many at once."""

    def started(self, worker: WorkerProcess) -> None:
        worker.channel.on("refused", self._take, TellsRefusals)

    def _take(self, told: TellsRefusals) -> None:
        client = unmap(ip_address(told.client))  # a ValueError is for the channel: that worker makes no sense
        kept = KeptRefusal(
            time.time(),
            client,
            told.listener,
            told.kind,
            told.id,
            told.rule,
            told.user,
            told.target,
            told.text,
            told.status,
        )
        with self._lock:
            self.missed += told.missed
            rows = self._kept.pop(client, None)
            if rows is None:
                rows = deque(maxlen=_OF_ONE_CLIENT)
                if len(self._kept) >= _MOST_CLIENTS:
                    self._kept.popitem(last=False)
            rows.append(kept)
            self._kept[client] = rows

    def of(self, client: IPAddress) -> list[KeptRefusal]:
        """Return the refusals of a client that are remembered, the latest first."""
        with self._lock:
            return list(reversed(self._kept.get(unmap(client), ())))

    def by_id(self, refusal: str) -> KeptRefusal | None:
        """Return the refusal with an id, None if it is not remembered."""
        with self._lock:
            return next((row for rows in self._kept.values() for row in rows if row.id == refusal), None)

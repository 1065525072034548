"""h11 as a judge of our reader: what we take as a message must be the same message to it, down to its last byte.

The rules by which we differ, and no others:

1. One empty line in front of a request line is taken (RFC 9112 section 2.2); h11 wants it gone.
2. A status above 599 is a server's failure, and read as 502 (RFC 9110 section 15).
3. What we refuse, h11 may take: it is the looser one.
"""

from __future__ import annotations

from dataclasses import dataclass

import h11

from rama_ebpf.services.http.h1.heads import RequestHead, ResponseHead
from rama_ebpf.services.http.message.headers import Headers

__all__ = ["Taken", "judge"]


@dataclass(frozen=True)
class Taken:
    """A message as our reader has taken it: ``data`` begins with it, and ``left`` bytes of that are behind it.

    ``method`` is that of the request, also for a response; ``ended`` tells that the peer closed behind ``data``.
    """

    head: RequestHead | ResponseHead
    body: bytes
    trailers: Headers | None
    data: bytes
    left: int
    method: str
    ended: bool


def judge(taken: Taken) -> None:
    """Raise AssertionError if h11 reads another message in the same bytes, or none."""
    request = isinstance(taken.head, RequestHead)
    connection = h11.Connection(h11.SERVER if request else h11.CLIENT, max_incomplete_event_size=2**31)
    data = taken.data
    if not request:
        target = b"a.test:1" if taken.method == "CONNECT" else b"/"
        connection.send(h11.Request(method=taken.method, target=target, headers=[("Host", "a.test")]))
        connection.send(h11.EndOfMessage())
    elif data.startswith(b"\r\n"):
        data = data[2:]
    connection.receive_data(data)
    if taken.ended:
        connection.receive_data(b"")
    body = b""
    head: h11.Request | h11.Response | None = None
    while True:
        event = connection.next_event()  # a RemoteProtocolError is a difference, too
        if isinstance(event, h11.Request | h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            break
        elif event is h11.PAUSED:
            break  # a tunnel: what follows is none of HTTP
        else:
            assert isinstance(event, h11.InformationalResponse), (event, taken)
    assert head is not None, taken
    _same_head(taken.head, head)
    assert body == taken.body, taken
    if isinstance(event, h11.EndOfMessage):
        trailers = [] if taken.trailers is None else taken.trailers.raw
        assert [(name.lower(), value) for name, value in trailers] == [tuple(field) for field in event.headers], taken
    left, _ = connection.trailing_data
    assert len(left) == taken.left, (left, taken)


def _same_head(ours: RequestHead | ResponseHead, theirs: h11.Request | h11.Response) -> None:
    assert ours.version.encode() == theirs.http_version
    if isinstance(ours, RequestHead):
        assert isinstance(theirs, h11.Request)
        assert ours.method.encode() == theirs.method
    else:
        assert isinstance(theirs, h11.Response)
        assert ours.status == (theirs.status_code if theirs.status_code < 600 else 502)
    told = [(name, bytes(value)) for name, value in theirs.headers]
    for name, _, value, _ in ours.headers._items:
        assert (name, value) in told, (name, value, told)

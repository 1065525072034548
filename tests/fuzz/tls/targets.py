"""The fuzz target for the ClientHello parser: it takes bytes and raises AssertionError if a guarantee does not hold.

Besides what the parser says of itself, OpenSSL is asked: where both read a ClientHello they must see one server name
and offer one protocol list to choose from, or what is decided here would not hold for the server behind.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable

from rama_ebpf.services.tls import AlertError, ClientHello, ClientHelloParser, Ja3, Ja4

__all__ = ["TARGETS", "client_hello"]

_LIMIT = 4096


def client_hello(data: bytes) -> None:
    """The first byte is how the rest is cut, the rest is what the client sends."""
    if not data:
        return
    chunk, sent = data[0] % 16 + 1, data[1:]
    whole = _outcome(sent, len(sent) or 1)
    assert _outcome(sent, chunk) == whole, "how bytes are cut into segments must not matter"
    if isinstance(whole, ClientHello):
        assert 0 < whole.length <= len(sent)
        assert _outcome(sent[: whole.length], 7) == whole, "what follows the message must not matter"
        assert _outcome(sent[: whole.length - 1], 7) is None, "it must not be complete before its end"
        name = whole.server_name
        assert name is None or (0 < len(name) <= 253 and name == name.lower() and name.isascii() and name.isprintable())
        assert len(Ja3.of(whole).digest) == 32
        assert len(Ja4.of(whole).value) == 36
        _agrees_with_openssl(whole, sent)


def _outcome(sent: bytes, chunk: int) -> object:
    parser = ClientHelloParser(_LIMIT)
    try:
        for at in range(0, len(sent), chunk):
            hello = parser.feed(sent[at : at + chunk])
            if hello is not None:
                return hello
    except AlertError as error:
        return type(error), error.alert, len(error.wire)
    return None


def _agrees_with_openssl(hello: ClientHello, sent: bytes) -> None:
    names: list[str | None] = []

    def look(_tls: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int:
        names.append(name)
        return int(ssl.ALERT_DESCRIPTION_ACCESS_DENIED)

    _CONTEXT.sni_callback = look
    incoming = ssl.MemoryBIO()
    incoming.write(sent[: hello.length])
    with contextlib.suppress(ssl.SSLError):  # it always fails, at the latest in the callback
        _CONTEXT.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True).do_handshake()
    for name in names:
        shown = None if name is None else name.lower().removesuffix(".")
        assert shown == hello.server_name, f"OpenSSL reads {name!r}, we read {hello.server_name!r}"


def _make_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


_CONTEXT = _make_context()

TARGETS: dict[str, Callable[[bytes], None]] = {"client_hello": client_hello}

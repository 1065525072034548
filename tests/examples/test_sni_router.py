from __future__ import annotations

import contextlib
import socket
import ssl

from rama_ebpf.services.proxy_protocol.header import parse
from rama_ebpf.services.tls.client_hello import ClientHelloParser
from rama_ebpf.services.tls.fingerprint import Ja4

from ..lab import Host, wait_for
from .conftest import RunExample, dropped


def _hello(name: str | None, *, odd: bool = False) -> bytes:
    """A ClientHello of OpenSSL's; an odd one without a server name, as scanners by address send it."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.set_alpn_protocols([] if odd else ["h2", "http/1.1"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def test_backends_learn_the_client_and_a_scanner_is_banned_in_the_kernel(run_example: RunExample, host: Host) -> None:
    scanner = _hello(None, odd=True)
    parsed = ClientHelloParser().feed(scanner)
    assert parsed is not None
    assert Ja4.of(parsed).value.startswith("t13i")
    backend = host.call(lambda: socket.create_server(("127.0.0.1", 8443)))
    proxy = run_example("sni_router:proxy", "--allow-egress", "127.0.0.0/8", listen="127.0.0.1:443")
    hello = _hello("a.example")
    with backend, host.connect("127.0.0.1", 443, source="127.0.7.7") as client:
        client.sendall(hello)
        backend.settimeout(30)
        connection, _ = backend.accept()
        with connection:
            connection.settimeout(30)
            data = b""
            while len(data) < len(hello) or not data.endswith(hello):
                data += connection.recv(65536)
        found = parse(data)
    assert found is not None
    header, length = found
    assert header.source is not None
    assert str(header.source.ip) == "127.0.7.7"
    assert data[length:] == hello
    with host.connect("127.0.0.1", 443, source="127.0.9.9") as client:
        client.sendall(scanner)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    bans = wait_for(lambda: proxy.json("list")["bans"], what="the ban")
    assert [ban["address"] for ban in bans] == ["127.0.9.9"]
    assert dropped(host, 443, "127.0.9.9")

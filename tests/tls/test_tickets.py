"""Session tickets: workers with one secret resume each other's sessions, and only where nothing is bypassed by it."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from rama_ebpf.services.tls import ClientAuth, KeyPair, ServerTls, TicketKeys

from .pki import Authority, Leaf

SECRET = bytes(range(48))
Versions = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])


@pytest.fixture(scope="module")
def leaf(authority: Authority) -> Leaf:
    return authority.issue("a.test", stem="tickets")


def connect(
    client: ssl.SSLContext, server: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[ssl.SSLSession, bool]:
    """Do a handshake in memory and pass a byte; return the client's session and whether it was resumed."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(to_client, to_server, server_hostname="a.test", session=session)
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (theirs, ours, theirs, ours):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    ours.write(b"x")
    assert theirs.read(1) == b"x"
    assert theirs.session is not None
    return theirs.session, bool(ours.session_reused)


@Versions
def test_contexts_with_one_secret_resume_each_others_sessions_and_others_do_not(
    leaf: Leaf, trust: ssl.SSLContext, version: ssl.TLSVersion
) -> None:
    trust.maximum_version = version
    pair = KeyPair(leaf.chain, leaf.key)
    first, second = (ServerTls(ticket_keys=TicketKeys(SECRET)).context(pair) for _ in range(2))
    session, _ = connect(trust, first)
    assert connect(trust, second, session)[1]
    for settings in (ServerTls(ticket_keys=TicketKeys(bytes(48))), ServerTls()):
        assert not connect(trust, settings.context(pair), session)[1]


@Versions
def test_no_ticket_opens_a_context_with_other_demands_on_clients(
    authority: Authority, leaf: Leaf, trust: ssl.SSLContext, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    trust.maximum_version = version
    pair = KeyPair(leaf.chain, leaf.key)
    keys = TicketKeys(SECRET)
    crl = tmp_path / "crl"
    crl.write_bytes(authority.revocation_list())
    optional = ServerTls(ticket_keys=keys, client_auth=ClientAuth.OPTIONAL, client_ca=authority.certificate)
    with_list = ServerTls(
        ticket_keys=keys, client_auth=ClientAuth.OPTIONAL, client_ca=authority.certificate, client_crl=crl
    )
    contexts = [settings.context(pair) for settings in (ServerTls(ticket_keys=keys), optional, with_list)]
    for context in contexts:
        session, _ = connect(trust, context)
        assert [connect(trust, other, session)[1] for other in contexts] == [other is context for other in contexts]
    crl.write_bytes(authority.revocation_list([leaf.certificate]))
    session, _ = connect(trust, contexts[2])
    assert not connect(trust, with_list.context(pair), session)[1]


WORKER = """
import socket, sys
from pathlib import Path
from rama_ebpf.services.tls import KeyPair, ServerTls, TicketKeys
_, secret, chain, key = sys.argv
context = ServerTls(ticket_keys=TicketKeys.from_file(Path(secret))).context(KeyPair(Path(chain), Path(key)))
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
with context.wrap_socket(listener.accept()[0], server_side=True) as tls:
    tls.sendall(b"resumed" if tls.session_reused else b"new")
"""


@Versions
def test_another_process_resumes_the_session(
    leaf: Leaf, trust: ssl.SSLContext, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    trust.maximum_version = version
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    session = None
    said = []
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, secret, leaf.chain, leaf.key], stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            port = int(worker.stdout.readline())
            with (
                socket.create_connection(("127.0.0.1", port), timeout=30) as sock,
                trust.wrap_socket(sock, server_hostname="a.test", session=session) as tls,
            ):
                said.append(tls.recv(100))
                session = tls.session
    assert said == [b"new", b"resumed"]


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        TicketKeys(bytes(31))

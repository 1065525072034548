"""Certificate stores: which certificate a name gets, what a directory holds, and what a reload may not break."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from rama_ebpf.services.tls import (
    Alert,
    AlertError,
    CertificateStore,
    ClientAuth,
    ClientHello,
    KeyPair,
    ServerTls,
)

from .pki import Authority, Leaf


def pair(leaf: Leaf) -> KeyPair:
    return KeyPair(leaf.chain, leaf.key)


def hello(name: str | None, *alpn: bytes) -> ClientHello:
    return ClientHello(0x0303, b"", (0x1301,), b"\0", (), server_name=name, alpn=alpn)


def shown_by(context: ssl.SSLContext) -> str:
    """The common name of the certificate that a context shows in a handshake."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_mode = ssl.CERT_NONE
    client = trusting.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    der = client.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).subject.rfc4514_string().removeprefix("CN=")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def own(tmp_path: Path) -> Authority:
    """An authority whose files may be changed."""
    return Authority(tmp_path)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a.test", "a.test"),
        ("b.test", "b.test"),
        ("alias.test", "b.test"),
        ("www.wild.test", "wild.test"),
        ("exact.wild.test", "b.test"),
        ("two.www.wild.test", "a.test"),
        ("wild.test", "wild.test"),
        ("unknown.test", "a.test"),
        (None, "a.test"),
    ],
)
async def test_a_name_gets_its_certificate_and_any_other_the_first(
    own: Authority, name: str | None, shown: str
) -> None:
    leaves = [
        own.issue("a.test"),
        own.issue("wild.test", "*.wild.test"),
        own.issue("b.test", "alias.test", "exact.wild.test"),
    ]
    store = CertificateStore.of_files(ServerTls(), *map(pair, leaves))
    assert shown_by(await store(hello(name))) == shown


@pytest.mark.parametrize("name", ["unknown.test", None])
async def test_a_strict_store_refuses_names_it_has_no_certificate_for(own: Authority, name: str | None) -> None:
    store = CertificateStore.of_files(ServerTls(), pair(own.issue("a.test")), strict_sni=True)
    with pytest.raises(AlertError) as caught:
        await store(hello(name))
    assert caught.value.alert is Alert.UNRECOGNIZED_NAME
    assert shown_by(await store(hello("a.test"))) == "a.test"


async def test_a_client_without_alpn_is_served_and_one_with_foreign_protocols_is_not(own: Authority) -> None:
    store = CertificateStore.of_files(ServerTls(alpn=("h2",)), pair(own.issue("a.test")))
    await store(hello("a.test"))
    await store(hello("a.test", b"http/1.1", b"h2"))
    with pytest.raises(AlertError) as caught:
        await store(hello("a.test", b"http/1.1"))
    assert caught.value.alert is Alert.NO_APPLICATION_PROTOCOL


async def test_a_directory_holds_pairs_bundles_and_subdirectories(own: Authority, tmp_path: Path) -> None:
    directory = tmp_path / "certs"
    (directory / "live").mkdir(parents=True)
    plain, bundle, live, default = (own.issue(f"{name}.test") for name in ("plain", "bundle", "live", "default"))
    (directory / "plain.crt").write_bytes(plain.chain.read_bytes())
    (directory / "plain.key").write_bytes(plain.key.read_bytes())
    (directory / "bundle.pem").write_bytes(bundle.key.read_bytes() + bundle.chain.read_bytes())
    (directory / "live" / "fullchain.pem").symlink_to(live.chain)
    (directory / "live" / "privkey.pem").symlink_to(live.key)
    (directory / "default.pem").write_bytes(default.chain.read_bytes() + default.key.read_bytes())
    (directory / "README").write_text("not a certificate")
    store = CertificateStore.of_directory(ServerTls(), directory)
    for name in ("plain", "bundle", "live", "default"):
        assert shown_by(await store(hello(f"{name}.test"))) == f"{name}.test"
    assert shown_by(await store(hello("other.test"))) == "default.test"


async def test_a_replaced_certificate_serves_the_next_client_after_a_check(own: Authority, tmp_path: Path) -> None:
    clock = Clock()
    leaf = own.issue("old.test", stem="site")
    store = CertificateStore(ServerTls(), lambda: [pair(leaf)], check_every=5.0, clock=clock)
    before = await store(hello(None))
    own.issue("new.test", stem="site")
    clock.now += 4.9
    assert await store(hello(None)) is before
    clock.now += 0.2
    assert shown_by(await store(hello(None))) == "new.test"
    assert shown_by(await store(hello("new.test"))) == "new.test"
    same = await store(hello(None))
    clock.now += 10
    assert await store(hello(None)) is same


async def test_a_certificate_that_does_not_fit_its_key_is_logged_once_and_the_old_one_serves_on(
    own: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    leaf = own.issue("old.test", stem="site")
    store = CertificateStore.of_files(ServerTls(), pair(leaf))
    new = own.issue("new.test", stem="other")
    leaf.chain.write_bytes(new.chain.read_bytes())  # half of a replacement
    for _ in range(3):
        store.reload()
        assert shown_by(await store(hello("old.test"))) == "old.test"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    leaf.key.write_bytes(new.key.read_bytes())
    store.reload()
    assert shown_by(await store(hello(None))) == "new.test"


async def test_a_vanished_file_or_directory_takes_nothing_away_until_another_is_there(
    own: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "certs"
    directory.mkdir()
    leaf = own.issue("a.test")
    for source, name in ((leaf.chain, "a.crt"), (leaf.key, "a.key")):
        (directory / name).write_bytes(source.read_bytes())
    store = CertificateStore.of_directory(ServerTls(), directory)
    (directory / "a.key").unlink()
    store.reload()
    store.reload()
    (directory / "a.crt").unlink()
    store.reload()
    directory.rmdir()
    store.reload()
    assert shown_by(await store(hello("a.test"))) == "a.test"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    directory.mkdir()
    other = own.issue("b.test")
    (directory / "b.pem").write_bytes(other.chain.read_bytes() + other.key.read_bytes())
    store.reload()
    assert shown_by(await store(hello("a.test"))) == "b.test"


@pytest.mark.root
@pytest.mark.parametrize("kind", ["files", "directory"])
async def test_files_that_a_worker_cannot_see_are_told_of_once_with_a_remedy(
    own: Authority, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    leaf = own.issue("closed.test")
    closed = tmp_path / "closed"
    closed.mkdir(0o700)
    for name, file in (("a.crt", leaf.chain), ("a.key", leaf.key)):
        (closed / name).write_bytes(file.read_bytes())
    if kind == "files":
        store = CertificateStore.of_files(ServerTls(), KeyPair(closed / "a.crt", closed / "a.key"))
    else:
        store = CertificateStore.of_directory(ServerTls(), closed)
    os.seteuid(65534)  # as a worker
    try:
        for _ in range(3):
            store.reload()
    finally:
        os.seteuid(0)
    assert shown_by(await store(hello("closed.test"))) == "closed.test"
    (record,) = caplog.records
    assert record.getMessage().endswith("(send SIGHUP after a renewal: root reads it then)")
    assert record.levelno == (logging.INFO if kind == "files" else logging.WARNING)


async def test_a_new_revocation_list_makes_a_new_context(own: Authority, tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    crl.write_bytes(own.revocation_list())
    settings = ServerTls(client_auth=ClientAuth.REQUIRED, client_ca=own.certificate, client_crl=crl)
    store = CertificateStore.of_files(settings, pair(own.issue("a.test")))
    before = await store(hello(None))
    store.reload()
    assert await store(hello(None)) is before
    crl.write_bytes(own.revocation_list([own.issue("tom", client=True).certificate]))
    os.utime(crl, ns=(1, 1))
    store.reload()
    assert await store(hello(None)) is not before


def test_what_cannot_be_served_is_refused_at_start(own: Authority, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no certificate"):
        CertificateStore.of_files(ServerTls())
    with pytest.raises(FileNotFoundError):
        CertificateStore.of_files(ServerTls(), KeyPair(tmp_path / "no.crt", tmp_path / "no.key"))
    leaf, other = own.issue("a.test"), own.issue("b.test")
    with pytest.raises(ValueError, match=r"a\.test\.crt.*: the key does not belong"):
        CertificateStore.of_files(ServerTls(), KeyPair(leaf.chain, other.key))
    key = serialization.load_pem_private_key(leaf.key.read_bytes(), None)
    leaf.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ValueError, match="encrypted"):
        CertificateStore.of_files(ServerTls(), pair(leaf))


def test_files_that_hold_something_else_are_named(own: Authority) -> None:
    leaf = own.issue("a.test")
    with pytest.raises(ValueError, match=r"a\.test\.key.*not a PEM certificate"):
        ServerTls().context(KeyPair(leaf.key, leaf.key))
    settings = ServerTls(client_auth=ClientAuth.REQUIRED, client_ca=leaf.key)
    with pytest.raises(ValueError, match=r"a\.test\.key: no PEM certificate"):
        settings.context(pair(leaf))


def test_settings_that_contradict_each_other_are_refused(own: Authority) -> None:
    with pytest.raises(ValueError, match="client_auth"):
        ServerTls(client_auth=ClientAuth.REQUIRED)
    with pytest.raises(ValueError, match="client_auth"):
        ServerTls(client_ca=own.certificate)
    with pytest.raises(ValueError, match="client_crl"):
        ServerTls(client_crl=own.certificate)

"""The interception authority: what it signs is accepted by strict clients, and its key is not given away."""

from __future__ import annotations

import datetime
import gc
import json
import os
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from rama_ebpf import cli
from rama_ebpf.services.tls import CertificateAuthority, LeafIssuer, ServerTls, ca
from rama_ebpf.services.tls.openssl import OpenSslUnavailable

from .pki import Authority


def shown_to(client: ssl.SSLContext, context: ssl.SSLContext, name: str) -> x509.Certificate:
    """Verify ``context``'s certificate for ``name`` with a real handshake and return it."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(to_client, to_server, server_hostname=name)
    ours = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (theirs, ours, theirs, ours):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    der = theirs.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


def trusting(authority: CertificateAuthority | Authority) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def sans(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def test_a_leaf_mirrors_names_addresses_and_validity(authority: Authority) -> None:
    ours = CertificateAuthority.create()
    day = datetime.timedelta(days=1)
    original = authority.issue("a.test", "*.wild.test", "192.0.2.1", "2001:db8::1", valid=(-3 * day, 5 * day))
    context = LeafIssuer(ours).mirroring(der(original.certificate), "a.test")
    for name in ("a.test", "www.wild.test", "192.0.2.1", "2001:db8::1"):
        leaf = shown_to(trusting(ours), context, name)
    assert sans(leaf) == ["a.test", "*.wild.test", "192.0.2.1", "2001:db8::1"]
    assert leaf.subject == original.certificate.subject
    assert leaf.not_valid_before_utc == max(
        original.certificate.not_valid_before_utc, ours.certificate.not_valid_before_utc
    )
    assert leaf.not_valid_after_utc == original.certificate.not_valid_after_utc
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    with pytest.raises(ssl.SSLCertVerificationError):
        shown_to(trusting(ours), context, "b.test")


def test_a_leaf_outlives_neither_its_model_nor_its_authority(authority: Authority) -> None:
    ours = CertificateAuthority.create(days=2)
    original = authority.issue("a.test", stem="long")
    leaf = shown_to(trusting(ours), LeafIssuer(ours).mirroring(der(original.certificate), "a.test"), "a.test")
    assert leaf.not_valid_after_utc == ours.certificate.not_valid_after_utc


def test_a_leaf_is_made_once_for_a_certificate_and_a_protocol_and_the_oldest_is_forgotten(
    authority: Authority,
) -> None:
    issuer = LeafIssuer(CertificateAuthority.create(), cache_size=2)
    one, two = (der(authority.issue(name, stem="cached").certificate) for name in ("a.test", "b.test"))
    first = issuer.mirroring(one, "a.test", ["h2"])
    assert issuer.mirroring(one, "a.test", ["h2"]) is first
    second = issuer.mirroring(one, "a.test", ["http/1.1"])
    assert second is not first
    assert issuer.mirroring(one, "a.test", ["h2"]) is first
    issuer.mirroring(two, "b.test", ["h2"])  # the one least recently used goes
    assert issuer.mirroring(one, "a.test", ["h2"]) is first
    assert issuer.mirroring(one, "a.test", ["http/1.1"]) is not second


def test_a_leaf_that_is_kept_is_for_the_name_that_was_asked_for(authority: Authority) -> None:
    issuer = LeafIssuer(CertificateAuthority.create())
    one = der(authority.issue("a.test", stem="named").certificate)
    assert issuer.mirroring(one, "a.test", ["h2"]) is not issuer.mirroring(one, "b.test", ["h2"])
    assert issuer.for_name("a.test") is not issuer.mirroring(one, "a.test")


@pytest.mark.parametrize(
    "name", ["made.up.test", "192.0.2.7", "a-name-of-more-than-64-characters." + "x" * 50 + ".test"]
)
def test_a_leaf_can_be_made_for_a_name_alone(name: str) -> None:
    ours = CertificateAuthority.create()
    issuer = LeafIssuer(ours, ServerTls())
    assert sans(shown_to(trusting(ours), issuer.for_name(name), name)) == [name]
    assert issuer.for_name(name) is issuer.for_name(name)


@pytest.mark.parametrize("reachable", [True, False], ids=["shared key", "key from a file"])
def test_a_leaf_comes_with_the_authority_if_that_is_an_intermediate(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    """Whether OpenSSL can be reached for the short way or not, a client that trusts the root is satisfied."""
    refused = []

    def unreachable(context: ssl.SSLContext, certificate: bytes, model: ssl.SSLContext) -> None:
        refused.append(certificate)
        raise OpenSslUnavailable("not here")

    if not reachable:
        monkeypatch.setattr(ca, "set_certificate", unreachable)
    issuer = LeafIssuer(CertificateAuthority(*authority.subordinate("the one between")))
    for name in ("one.test", "two.test"):
        leaf = shown_to(trusting(authority), issuer.for_name(name), name)
        assert sans(leaf) == [name]
        assert leaf.issuer.rfc4514_string() == "CN=the one between"
    assert len(refused) == (0 if reachable else 2)


def test_leaves_outlive_the_issuer_whose_key_they_share() -> None:
    ours = CertificateAuthority.create()
    context = LeafIssuer(ours).for_name("a.test")  # the issuer, and with it the context that held the key, is gone
    gc.collect()
    assert sans(shown_to(trusting(ours), context, "a.test")) == ["a.test"]


def test_an_authority_may_sign_leaves_only() -> None:
    certificate = CertificateAuthority.create().certificate
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature


def test_the_command_makes_an_authority_whose_key_only_its_owner_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = os.umask(0)
    try:
        arguments = ["--cert", str(tmp_path / "ca.pem"), "--key", str(tmp_path / "ca.key"), "--name", "test CA"]
        assert cli.main(["ca", "create", "--json", *arguments]) == 0
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "ca.key").stat().st_mode) == 0o600
    loaded = CertificateAuthority.load(tmp_path / "ca.pem", tmp_path / "ca.key")
    said = json.loads(capsys.readouterr().out)
    assert said["sha256"] == loaded.fingerprint
    assert loaded.certificate.subject.rfc4514_string() == "CN=test CA"
    before = (tmp_path / "ca.key").read_bytes()
    assert cli.main(["ca", "create", *arguments]) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "ca.key").read_bytes() == before


def test_the_command_leaves_no_key_without_its_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ca.pem").write_text("an older one")
    assert cli.main(["ca", "create", "--cert", str(tmp_path / "ca.pem"), "--key", str(tmp_path / "ca.key")]) == 2
    assert not (tmp_path / "ca.key").exists()
    assert cli.main(["ca", "create", "--cert", str(tmp_path / "no" / "ca.pem"), "--key", str(tmp_path / "k")]) == 3
    assert f"No such file or directory: '{tmp_path / 'no' / 'ca.pem'}'" in capsys.readouterr().err
    assert not (tmp_path / "k").exists()


def test_files_that_are_no_authority_are_refused_by_name(authority: Authority, tmp_path: Path) -> None:
    ours, other = CertificateAuthority.create(), CertificateAuthority.create()
    ours.save(tmp_path / "a.pem", tmp_path / "a.key")
    other.save(tmp_path / "b.pem", tmp_path / "b.key")
    with pytest.raises(ValueError, match="does not belong"):
        CertificateAuthority.load(tmp_path / "a.pem", tmp_path / "b.key")
    leaf = authority.issue("a.test", stem="no-authority")
    with pytest.raises(ValueError, match="not one of an authority"):
        CertificateAuthority.load(leaf.chain, leaf.key)
    with pytest.raises(ValueError, match=r"a\.key"):
        CertificateAuthority.load(tmp_path / "a.key", tmp_path / "a.key")
    with pytest.raises(ValueError, match=r"a\.pem"):
        CertificateAuthority.load(tmp_path / "a.pem", tmp_path / "a.pem")


def test_an_authority_whose_first_day_is_ahead_of_the_clock_is_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    later = datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(days=2)
    with monkeypatch.context() as clock:
        clock.setattr(ca, "_now", lambda: later)
        CertificateAuthority.create().save(tmp_path / "ca.pem", tmp_path / "ca.key")
    wanted = r"^the authority's certificate is valid from .* UTC on, and this host's clock says .* UTC: set the clock$"
    with pytest.raises(ValueError, match=wanted):
        CertificateAuthority.load(tmp_path / "ca.pem", tmp_path / "ca.key")


@pytest.mark.root
def test_an_authority_on_a_full_disk_is_whole_or_absent_and_can_be_made_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        (disk / "ours").mkdir()
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(bytes(1 << 20))
        files = ["--cert", str(disk / "ours/ca.pem"), "--key", str(disk / "ours/ca.key")]
        assert cli.main(["ca", "create", *files]) == 3
        assert os.listdir(disk / "ours") == []
        (disk / "filler").unlink()
        assert cli.main(["ca", "create", *files]) == 0
        assert sorted(os.listdir(disk / "ours")) == ["ca.key", "ca.pem"]
        assert cli.main(["ca", "create", *files]) == 2, "it replaces nothing"
    finally:
        subprocess.run(["umount", disk], check=True)

"""The ClientHello parser and the fingerprints: published answers in any cut of the bytes, and only typed errors."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rama_ebpf.services.tls import (
    Alert,
    AlertError,
    ClientHello,
    ClientHelloParser,
    Ja3,
    Ja4,
    NotTls,
    fingerprint,
)

from .hello import build, extension, handshake, of_vector, records, server_name, vec
from .vectors import VECTORS, Vector

CHROME = records(of_vector(VECTORS[1]))


def parse(data: bytes, limit: int = 32768) -> ClientHello:
    hello = ClientHelloParser(limit).feed(data)
    assert hello is not None
    return hello


def body_with(*extensions: bytes) -> bytes:
    return records(handshake(build(b"".join(extensions))))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.source)
def test_ja4_and_ja3_equal_the_published_ones(vector: Vector) -> None:
    hello = parse(records(of_vector(vector)))
    assert Ja4.of(hello).value == vector.ja4
    assert Ja3.of(hello).digest == vector.ja3
    assert hello.server_name == vector.server_name


def test_ja3_equals_the_examples_of_its_authors() -> None:
    # README of salesforce/ja3, "How it works".
    with_extensions = ClientHello(
        769,
        b"",
        (47, 53, 5, 10, 49161, 49162, 49171, 49172, 50, 56, 19, 4),
        b"\0",
        (0, 10, 11),
        supported_groups=(23, 24, 25),
        point_formats=(0,),
    )
    assert Ja3.of(with_extensions).digest == "ada70206e40642a3e4461f35503241d5"
    without = ClientHello(769, b"", (4, 5, 10, 9, 100, 98, 3, 6, 19, 18, 99), b"\0", ())
    assert Ja3.of(without).digest == "de350869b8c85de67a350c8d186f11e6"


@pytest.mark.parametrize(
    ("alpn", "ends"),
    [
        # technical_details/JA4.md, "ALPN Extension Value"
        ("6832", "h2"),
        ("687474702f312e31", "h1"),
        ("68", "hh"),
        ("ab", "ab"),
        ("20", "20"),
        ("abcd", "ad"),
        ("2061", "21"),
        ("30ab", "3b"),
        ("6120", "60"),
        ("3031abcd", "3d"),
        ("30abcd31", "01"),
    ],
)
def test_ja4_shows_the_ends_of_the_first_protocol(alpn: str, ends: str) -> None:
    protocols = vec(2, vec(1, bytes.fromhex(alpn)) + vec(1, b"http/1.1"))
    assert Ja4.of(parse(body_with(extension(16, protocols)))).value.split("_")[0] == f"t12i0201{ends}"


def test_ja4_counts_no_grease_and_stops_at_99() -> None:
    ciphers = [0x0A0A, *range(1, 121), 0xFAFA]
    hello = parse(records(handshake(build(server_name(b"a.test"), cipher_suites=ciphers))))
    assert Ja4.of(hello).value == (
        "t12d990100_"
        + hashlib.sha256(",".join(f"{n:04x}" for n in range(1, 121)).encode()).hexdigest()[:12]
        + "_"
        + "0" * 12
    )


def test_what_is_kept_of_fingerprints_is_bounded() -> None:
    """By number, and by size: a client cannot have us remember lists that no client sends."""
    kept = fingerprint._ja4.cache_info
    for number in range(600):
        ordinary = parse(records(handshake(build(server_name(b"a.test"), cipher_suites=[number, 0x1301]))))
        assert Ja4.of(ordinary) == Ja4.of(ordinary)
    assert kept().currsize == kept().maxsize == 256
    misses = kept().misses
    huge = parse(records(handshake(build(server_name(b"a.test"), cipher_suites=range(10_000)))))
    assert Ja4.of(huge).value.startswith("t12d990100_")
    assert kept().misses == misses


def test_the_answer_does_not_depend_on_how_segments_cut_it() -> None:
    whole = parse(CHROME)
    for cut in range(1, len(CHROME)):
        parser = ClientHelloParser()
        assert parser.feed(CHROME[:cut]) is None
        assert parser.feed(CHROME[cut:]) == whole, cut
    parser = ClientHelloParser()
    answers = [parser.feed(CHROME[i : i + 1]) for i in range(len(CHROME))]
    assert answers[:-1] == [None] * (len(CHROME) - 1)
    assert answers[-1] == whole


def test_the_answer_does_not_depend_on_how_records_cut_it() -> None:
    message = of_vector(VECTORS[1])
    whole = Ja4.of(parse(CHROME))
    for size in range(1, len(message) + 1):
        data = records(message, size)
        hello = parse(data)
        assert Ja4.of(hello) == whole
        assert hello.length == len(data)


def test_what_follows_the_message_is_ignored_and_not_counted() -> None:
    early = b"\x17\x03\x03\x00\x10" + bytes(16)
    assert parse(CHROME + early) == parse(CHROME)
    # more handshake bytes in the message's own record
    message = of_vector(VECTORS[1])
    together = records(message + b"\x0b\x00\x00\x00")
    assert parse(together).length == len(together) - 4


def test_post_quantum_key_shares_are_read() -> None:
    x25519mlkem768 = 0x11EC
    shares = vec(2, bytes.fromhex("11ec") + vec(2, bytes(1216)) + bytes.fromhex("001d") + vec(2, bytes(32)))
    hello = parse(records(handshake(build(server_name(b"pq.test") + extension(51, shares))), 600))
    assert hello.key_shares == (x25519mlkem768, 0x001D)
    assert hello.server_name == "pq.test"


def test_an_encrypted_client_hello_is_recognised_by_its_outer_form() -> None:
    outer = extension(0xFE0D, b"\0" + bytes(40))
    hello = parse(body_with(server_name(b"public.test"), outer))
    assert hello.encrypted_client_hello
    assert hello.server_name == "public.test"
    assert not parse(CHROME).encrypted_client_hello


def test_a_hello_without_extensions_is_a_hello() -> None:
    hello = parse(records(handshake(build(None, legacy_version=0x0301, cipher_suites=[4, 5]))))
    assert hello.server_name is None
    assert Ja4.of(hello).value.startswith("t10i020000_")


def test_a_server_name_is_lower_case_without_the_final_dot() -> None:
    assert parse(body_with(server_name(b"WWW.Example.TEST."))).server_name == "www.example.test"
    assert parse(body_with(server_name(b"_dmarc.xn--bcher-kva.test"))).server_name == "_dmarc.xn--bcher-kva.test"


@pytest.mark.parametrize(
    "name",
    [
        *[b"", b".", b"a..test", b"127.0.0.1", b"::1", b"[::1]", b"a" * 300, (b"a" * 60 + b".") * 5 + b"test"],
        *[b"a\0.test", b"a b", b"-a.test", b"a-.test", b"b\xc3\xbccher.test", b"*.test", b"a/b", b"a" * 64 + b".test"],
    ],
)
def test_a_server_name_that_is_no_host_name_is_refused(name: bytes) -> None:
    with pytest.raises(AlertError) as caught:
        parse(body_with(server_name(name)))
    assert caught.value.alert in (Alert.UNRECOGNIZED_NAME, Alert.DECODE_ERROR)
    assert caught.value.wire == bytes((21, 3, 1, 0, 2, 2, caught.value.alert))


_NAME = b"\0" + vec(2, b"a.test")


@pytest.mark.parametrize(
    ("data", "alert"),
    [
        (body_with(server_name(b"a.test"), server_name(b"b.test")), Alert.ILLEGAL_PARAMETER),
        (body_with(extension(0, vec(2, _NAME + _NAME))), Alert.ILLEGAL_PARAMETER),
        (body_with(extension(0, vec(2, b"\1" + vec(2, b"a.test")))), Alert.ILLEGAL_PARAMETER),
        (body_with(extension(0, b"")), Alert.DECODE_ERROR),
        (body_with(extension(0, vec(2, _NAME) + b"\0")), Alert.DECODE_ERROR),
        (body_with(extension(16, vec(2, b"\0"))), Alert.DECODE_ERROR),
        (body_with(extension(16, vec(2, vec(1, b"h2") + b"\0"))), Alert.DECODE_ERROR),
        (body_with(extension(16, vec(2, b"\x09h2"))), Alert.DECODE_ERROR),
        (body_with(extension(43, b"\x03\x03\x04\x03")), Alert.DECODE_ERROR),
        (body_with(extension(51, vec(2, b"\0\x1d\0\0"))), Alert.DECODE_ERROR),
        (body_with(b"\0\x0a\0"), Alert.DECODE_ERROR),
        (records(handshake(build(b"") + b"\0")), Alert.DECODE_ERROR),
        (records(handshake(build(b"", session_id=bytes(33)))), Alert.DECODE_ERROR),
        (records(handshake(build(b"", cipher_suites=[]))), Alert.DECODE_ERROR),
        (records(handshake(b"\x03\x03")), Alert.DECODE_ERROR),
        (records(handshake(b"")), Alert.DECODE_ERROR),
        (records(handshake(b"", kind=2)), Alert.UNEXPECTED_MESSAGE),
        (b"\x16\x03\x01\0\0", Alert.UNEXPECTED_MESSAGE),
        (b"\x16\x03\x01\x40\x01", Alert.RECORD_OVERFLOW),
        (b"\x16\x03\x01\xff\xff", Alert.RECORD_OVERFLOW),
        (b"\x16\x03\x05", Alert.PROTOCOL_VERSION),
        (b"\x16\x03\x01\0\x01\x01\x17", Alert.UNEXPECTED_MESSAGE),
        (b"\x16\x03\x01\0\x01\x01\x16\x02", Alert.PROTOCOL_VERSION),
        (b"\x16\x03\x01\0\x04\x01\x01\0\0", Alert.RECORD_OVERFLOW),
        (b"\x80\x2e\x01\x03\x01", Alert.PROTOCOL_VERSION),
    ],
)
def test_a_malformed_hello_has_its_alert(data: bytes, alert: Alert) -> None:
    with pytest.raises(AlertError) as caught:
        ClientHelloParser().feed(data)
    assert caught.value.alert is alert


@pytest.mark.parametrize(
    "data",
    [
        *[b"G", b"GET / HTTP/1.1\r\n", b"\x05\x01\0", b"\x04\x01", b"SSH-2.0-x", b"PROXY TCP4 ", b"\r\n\r\n\0\r\nQUIT"],
        *[b"\x16\x02", b"\0", b"\x80\x2e\x02", b"\xff\xff\xff"],
    ],
)
def test_another_protocol_is_told_by_its_first_bytes(data: bytes) -> None:
    with pytest.raises(NotTls):
        ClientHelloParser().feed(data)


def test_one_byte_records_without_end_are_refused_at_the_limit() -> None:
    parser = ClientHelloParser(4096)
    message = handshake(bytes(4092))
    fits = 4095 // 6
    assert parser.feed(records(message[:fits], 1)) is None
    with pytest.raises(AlertError, match="4096 bytes") as caught:
        parser.feed(records(message[fits : fits + 1]))
    assert caught.value.alert is Alert.RECORD_OVERFLOW


@given(st.binary(max_size=400))
def test_any_bytes_give_a_hello_a_wait_or_an_alert(data: bytes) -> None:
    for prefix in (b"", b"\x16\x03\x01", b"\x16\x03\x01\x00\xff\x01\0\0\xfb\x03\x03"):
        try:
            hello = ClientHelloParser().feed(prefix + data)
        except AlertError:
            continue
        assert hello is None or hello.length <= len(prefix + data)


@given(st.data())
def test_a_damaged_hello_gives_a_hello_a_wait_or_an_alert_the_same_in_any_cut(data: st.DataObject) -> None:
    damaged = bytearray(CHROME)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))

    def outcome(*parts: bytes) -> object:
        parser = ClientHelloParser()
        hello = None
        try:
            for part in parts:
                if hello is None:
                    hello = parser.feed(part)
        except AlertError as error:
            return str(error), error.alert
        return hello

    whole = outcome(bytes(damaged))
    in_two = outcome(bytes(damaged[:cut]), bytes(damaged[cut:]))
    # An error may be known from fewer bytes: then its text quotes fewer.
    assert whole == in_two or (isinstance(whole, tuple) and isinstance(in_two, tuple) and whole[1] == in_two[1])

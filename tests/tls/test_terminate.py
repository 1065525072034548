"""Terminating TLS for real clients: curl, openssl s_client, Node and Python's ssl, in both versions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rama_ebpf.core import HandshakeTimeout, LimitExceeded, PeerClosed, RamaError, Stream, stack
from rama_ebpf.services.tls import (
    AlertError,
    CertificateRejected,
    CertificateStore,
    ClientAuth,
    ClientHello,
    HandshakeFailed,
    KeyPair,
    ServerTls,
    TlsAction,
    TlsDenied,
    TlsMatch,
    TlsParameters,
    TlsPeekLayer,
    TlsPolicyLayer,
    TlsRule,
    TlsStrike,
    TlsTerminateLayer,
)

from .conftest import HOST, Running, Serve
from .hello import build, handshake, records, server_name
from .pki import Authority, Leaf

Run = Callable[..., Awaitable[tuple[int, str, str]]]


def key_pair(leaf: Leaf) -> KeyPair:
    return KeyPair(leaf.chain, leaf.key)


@pytest.fixture(scope="module")
def leaf(authority: Authority) -> Leaf:
    return authority.issue("a.test", "*.wild.test", stem="terminate")


REQUEST = "GET / HTTP/1.1\r\n\r\n"


async def answer(stream: Stream) -> TlsParameters:
    """One HTTP/1.1 response that says what was agreed on."""
    while b"\r\n\r\n" not in stream.buffered:
        if not await stream.fill():
            raise PeerClosed("no request")
    agreed = stream.extensions.require(TlsParameters)
    body = f"{agreed.version} {agreed.alpn} {agreed.server_name} resumed={agreed.resumed}\n".encode()
    await stream.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body), body)
    return agreed


async def echo(stream: Stream) -> int:
    """Send back what comes until the client ends."""
    total = 0
    while data := await stream.read():
        total += len(data)
        await stream.write(data)
    return total


async def echo_and_bye(stream: Stream) -> int:
    """Echo, and have a last word after the client has half-closed."""
    total = await echo(stream)
    await stream.write(b"bye\n")
    return total


def terminating(service: Callable[[Stream], Awaitable[object]], settings: ServerTls, *leaves: Leaf) -> object:
    return stack(TlsTerminateLayer(CertificateStore.of_files(settings, *map(key_pair, leaves))), service)


@pytest.mark.parametrize(("flag", "version"), [("1.2", "TLSv1.2"), ("1.3", "TLSv1.3")])
async def test_curl(serve: Serve, run: Run, leaf: Leaf, authority: Authority, flag: str, version: str) -> None:
    running = serve(terminating(answer, ServerTls(alpn=("http/1.1",)), leaf))
    code, out, err = await run(
        *("curl", "-sS", "--cacert", authority.certificate, f"--tlsv{flag}", "--tls-max", flag),
        *("--connect-to", f"::{HOST}:{running.port}", "https://www.wild.test/"),
    )
    assert (code, err) == (0, "")
    assert out == f"{version} http/1.1 www.wild.test resumed=False\n"
    await running.idle()
    assert running.errors == []


async def test_curl_refuses_a_name_that_the_certificate_is_not_for(
    serve: Serve, run: Run, leaf: Leaf, authority: Authority
) -> None:
    running = serve(terminating(answer, ServerTls(), leaf))
    code, _, _ = await run(
        *("curl", "-sS", "--cacert", authority.certificate),
        *("--connect-to", f"::{HOST}:{running.port}", "https://www.deep.wild.test/"),
    )
    assert code == 60
    await running.idle()
    # curl looks at the name after the handshake is over.
    assert [type(error) for error in running.errors] == [PeerClosed]


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_openssl_agrees_on_alpn(
    serve: Serve, run: Run, leaf: Leaf, authority: Authority, protocol: str, version: str
) -> None:
    running = serve(terminating(answer, ServerTls(alpn=("h2", "http/1.1")), leaf))
    code, out, _ = await run(
        *("openssl", "s_client", "-connect", f"{HOST}:{running.port}", "-servername", "a.test", version),
        *("-alpn", protocol, "-CAfile", authority.certificate, "-verify_return_error", "-quiet"),
        stdin=REQUEST,
    )
    assert code == 0
    assert out.splitlines()[-1] == f"TLSv1.{version[-1]} {protocol} a.test resumed=False"
    await running.idle()
    assert running.errors == []


async def test_a_client_whose_protocols_are_not_served_is_told_so(
    serve: Serve, run: Run, leaf: Leaf, authority: Authority
) -> None:
    running = serve(terminating(echo, ServerTls(alpn=("h2",)), leaf))
    code, _, err = await run(
        "openssl", "s_client", "-connect", f"{HOST}:{running.port}", "-alpn", "spdy/1", "-brief", stdin=""
    )
    assert code != 0
    assert "no application protocol" in err
    await running.idle()
    assert [type(error) for error in running.errors] == [AlertError]


async def test_a_client_of_http_1_0_is_served_where_1_1_is(
    serve: Serve, run: Run, leaf: Leaf, authority: Authority
) -> None:
    running = serve(terminating(answer, ServerTls(alpn=("h2", "http/1.1")), leaf))
    code, out, _ = await run(
        *("openssl", "s_client", "-connect", f"{HOST}:{running.port}", "-servername", "a.test", "-alpn", "http/1.0"),
        *("-CAfile", authority.certificate, "-verify_return_error", "-quiet"),
        stdin=REQUEST,
    )
    assert code == 0
    assert out.splitlines()[-1].startswith("TLSv1.3 None a.test")


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_openssl_resumes_its_session(serve: Serve, run: Run, leaf: Leaf, tmp_path: Path, version: str) -> None:
    running = serve(terminating(answer, ServerTls(), leaf))
    session = tmp_path / "session"
    for argument, word in (("-sess_out", "New"), ("-sess_in", "Reused")):
        _, out, _ = await run(
            *("openssl", "s_client", "-connect", f"{HOST}:{running.port}", "-servername", "a.test", version),
            *(argument, session, "-ign_eof"),
            stdin=REQUEST,
        )
        assert re.search(rf"^{word}, TLSv1", out, re.MULTILINE), out
        assert f"resumed={word == 'Reused'}" in out


class Mtls:
    """A listener that demands a client certificate, and three of them: good, revoked, of a stranger's CA."""

    def __init__(self, authority: Authority, directory: Path) -> None:
        self.good = authority.issue("tom", stem="tom", client=True)
        self.revoked = authority.issue("eve", stem="eve", client=True)
        self.stranger = Authority(directory, "stranger").issue("tom", client=True)
        self.crl = directory / "clients.crl"
        self.crl.write_bytes(authority.revocation_list([self.revoked.certificate]))
        self.settings = ServerTls(client_auth=ClientAuth.REQUIRED, client_ca=authority.certificate, client_crl=self.crl)


@pytest.fixture
def mtls(authority: Authority, tmp_path: Path) -> Mtls:
    return Mtls(authority, tmp_path)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_only_a_client_with_a_good_certificate_gets_in(
    serve: Serve, run: Run, leaf: Leaf, authority: Authority, mtls: Mtls, version: str
) -> None:
    running = serve(terminating(answer, mtls.settings, leaf))

    async def curl(*argv: str | Path) -> int:
        code, _, _ = await run(
            *("curl", "-sS", "--cacert", authority.certificate, f"--tlsv{version}", "--tls-max", version, *argv),
            *("--connect-to", f"::{HOST}:{running.port}", "https://a.test/"),
        )
        await running.idle()
        return code

    assert await curl("--cert", mtls.good.chain, "--key", mtls.good.key) == 0
    agreed = running.results[0]
    assert isinstance(agreed, TlsParameters)
    assert agreed.peer_certificate is not None
    for client in (mtls.revoked, mtls.stranger):
        assert await curl("--cert", client.chain, "--key", client.key) != 0
    assert await curl() != 0
    assert len(running.results) == 1
    assert [type(error) for error in running.errors] == [CertificateRejected, CertificateRejected, HandshakeFailed]
    assert ["revoked" in str(running.errors[0]), "self-signed" in str(running.errors[1])] == [True, True]


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_openssl_shows_its_certificate(
    serve: Serve, run: Run, leaf: Leaf, authority: Authority, mtls: Mtls, version: str
) -> None:
    running = serve(terminating(answer, mtls.settings, leaf))

    async def s_client(*argv: str | Path) -> str:
        _, out, err = await run(
            *("openssl", "s_client", "-connect", f"{HOST}:{running.port}", "-servername", "a.test", version),
            *("-CAfile", authority.certificate, "-verify_return_error", "-ign_eof", *argv),
            stdin=REQUEST,
        )
        await running.idle()
        return out + err

    assert "a.test resumed=False" in await s_client("-cert", mtls.good.chain, "-key", mtls.good.key)
    assert "alert certificate revoked" in await s_client("-cert", mtls.revoked.chain, "-key", mtls.revoked.key)
    assert "alert unknown ca" in await s_client("-cert", mtls.stranger.chain, "-key", mtls.stranger.key)
    # What a client without one is told has another name before TLS 1.3 (RFC 8446 section 6.2).
    assert re.search("alert (certificate required|handshake failure)", await s_client())
    assert [type(error) for error in running.errors] == [CertificateRejected, CertificateRejected, HandshakeFailed]


async def test_an_optional_client_certificate_must_be_good_where_one_is_shown(
    serve: Serve, run: Run, leaf: Leaf, authority: Authority, mtls: Mtls
) -> None:
    settings = ServerTls(client_auth=ClientAuth.OPTIONAL, client_ca=authority.certificate, client_crl=mtls.crl)
    running = serve(terminating(answer, settings, leaf))

    async def curl(*argv: str | Path) -> int:
        address = ("--connect-to", f"::{HOST}:{running.port}", "https://a.test/")
        code, _, _ = await run("curl", "-sS", "--cacert", authority.certificate, *argv, *address)
        return code

    assert await curl() == 0
    assert await curl("--cert", mtls.good.chain, "--key", mtls.good.key) == 0
    assert await curl("--cert", mtls.revoked.chain, "--key", mtls.revoked.key) != 0


async def test_policy_refuses_a_client_before_its_handshake_begins(
    serve: Serve, leaf: Leaf, trust: ssl.SSLContext
) -> None:
    policy = TlsPolicyLayer(
        [
            TlsRule("no-wild", TlsMatch(sni=[".wild.test"]), TlsAction.CLOSE),
            TlsRule("no-h2", TlsMatch(ja4=["t13*"], alpn=["h2"]), TlsAction.STRIKE),
        ]
    )
    store = CertificateStore.of_files(ServerTls(), key_pair(leaf))
    running = serve(stack(TlsTerminateLayer(store, policy=policy), echo))

    async def connect(name: str) -> None:
        _, writer = await asyncio.open_connection(HOST, running.port, ssl=trust, server_hostname=name)
        writer.close()
        await writer.wait_closed()

    with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
        await connect("x.wild.test")
    await connect("a.test")
    await running.idle()
    assert len(running.results) == 1
    trust.set_alpn_protocols(["h2"])
    with pytest.raises(ConnectionResetError):
        await connect("a.test")
    await running.idle()
    assert [type(error) for error in running.errors] == [TlsDenied, TlsStrike]


NODE = """
const tls = require("tls"), fs = require("fs");
const [port, ca, version] = process.argv.slice(1);
const socket = tls.connect({port: +port, host: "127.0.0.1", servername: "a.test", ca: fs.readFileSync(ca),
                            minVersion: version, maxVersion: version, ALPNProtocols: ["h2"], allowHalfOpen: true});
let got = Buffer.alloc(0);
socket.on("secureConnect", () => { socket.write(Buffer.alloc(300000, "x")); socket.end("end\\n"); });
socket.on("data", data => { got = Buffer.concat([got, data]); });
socket.on("end", () => console.log(socket.alpnProtocol, got.length, got.subarray(-8).toString()));
"""


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_node_half_closes_and_gets_the_rest(
    serve: Serve, run: Run, leaf: Leaf, authority: Authority, version: str
) -> None:
    running = serve(terminating(echo_and_bye, ServerTls(alpn=("h2",)), leaf))
    code, out, err = await run("node", "-e", NODE, str(running.port), authority.certificate, version)
    assert (code, err) == (0, "")
    assert out == "h2 300008 end\nbye\n\n"
    await running.idle()
    assert running.results == [300004]


async def test_openssl_updates_its_keys_and_asks_for_ours(serve: Serve, run: Run, leaf: Leaf) -> None:
    running = serve(terminating(echo, ServerTls(), leaf))
    process = await asyncio.create_subprocess_exec(
        *("openssl", "s_client", "-connect", f"{HOST}:{running.port}", "-tls1_3"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for line in (b"one\n", b"K\n", b"two\n", b"k\n", b"K\n", b"three\n"):
        process.stdin.write(line)
        await process.stdout.readuntil(line if len(line) > 2 else b"KEYUPDATE\n")
    process.stdin.write(b"Q\n")
    await process.communicate()
    await running.idle()
    assert running.results == [len("one\ntwo\nthree\n")]


async def early_hello(trust: ssl.SSLContext, running: Running, data: bytes) -> bytes:
    """Do a handshake by hand and send Finished, ``data``, close_notify and FIN in one segment; return the answer."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trust.wrap_bio(incoming, outgoing, server_hostname="a.test")
    reader, writer = await running.connect()
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            writer.write(outgoing.read())
            incoming.write(await reader.read(65536))
    tls.write(data)
    with pytest.raises(ssl.SSLWantReadError):
        tls.unwrap()
    writer.write(outgoing.read())
    writer.write_eof()
    incoming.write(await reader.read())
    writer.close()
    answer = b""
    with contextlib.suppress(ssl.SSLZeroReturnError):
        while part := tls.read(65536):
            answer += part
    return answer


async def test_data_and_end_in_the_same_segment_as_finished_are_all_seen(
    serve: Serve, leaf: Leaf, trust: ssl.SSLContext
) -> None:
    trust.maximum_version = ssl.TLSVersion.TLSv1_3
    running = serve(terminating(echo_and_bye, ServerTls(), leaf))
    assert await early_hello(trust, running, b"x" * 20_000) == b"x" * 20_000 + b"bye\n"
    await running.idle()
    assert running.results == [20_000]


async def test_a_fin_right_after_the_hello_ends_the_handshake_at_once(
    serve: Serve, leaf: Leaf, trust: ssl.SSLContext
) -> None:
    running = serve(terminating(echo, ServerTls(), leaf))
    reader, writer = await running.connect()
    writer.write(client_hello(trust))
    writer.write_eof()
    assert await reader.readexactly(1) == b"\x16"  # the server's answer is sent all the same
    writer.close()
    await running.idle()
    assert [error.kind for error in running.errors if isinstance(error, RamaError)] == ["peer_closed"]


def client_hello(context: ssl.SSLContext, name: str = "a.test") -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


async def test_a_client_that_stops_in_the_middle_of_the_handshake_is_cut(
    serve: Serve, leaf: Leaf, trust: ssl.SSLContext
) -> None:
    store = CertificateStore.of_files(ServerTls(), key_pair(leaf))
    running = serve(stack(TlsTerminateLayer(store, handshake_timeout=0.1), echo))
    for sent in (b"", client_hello(trust)[:50], client_hello(trust)):
        reader, writer = await running.connect()
        writer.write(sent)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
    await running.idle()
    assert [type(error) for error in running.errors] == [HandshakeTimeout] * 3


async def test_handshakes_above_the_limit_are_cut_and_the_place_of_an_ended_one_is_free_again(
    serve: Serve, leaf: Leaf, trust: ssl.SSLContext
) -> None:
    store = CertificateStore.of_files(ServerTls(), key_pair(leaf))
    layer = TlsTerminateLayer(store, max_handshakes=2)
    running = serve(stack(layer, echo))
    waiting = [await running.connect() for _ in range(2)]
    while layer.handshakes < 2:  # noqa: ASYNC110 - a plain counter, which nothing else waits for
        await asyncio.sleep(0.001)
    reader, writer = await running.connect()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    assert [type(error) for error in running.errors] == [LimitExceeded]
    for _, idle in waiting:
        idle.close()
    await running.idle()
    reader, writer = await asyncio.open_connection(HOST, running.port, ssl=trust, server_hostname="a.test")
    writer.write(b"in")
    assert await reader.readexactly(2) == b"in"
    writer.close()
    await writer.wait_closed()


async def test_a_service_that_fails_is_no_orderly_end_for_the_client(
    serve: Serve, leaf: Leaf, trust: ssl.SSLContext
) -> None:
    async def failing(stream: Stream) -> None:
        await stream.write(b"half of the answ")
        raise RamaError("upstream broke")

    trust.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    running = serve(terminating(failing, ServerTls(), leaf))
    reader, writer = await asyncio.open_connection(HOST, running.port, ssl=trust, server_hostname="a.test")
    with pytest.raises(OSError, match=r"reset|EOF"):
        await reader.read()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


BAD = {
    "plain HTTP": b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "SOCKS5": b"\x05\x01\x00",
    "SOCKS4": b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00",
    "SSLv2": bytes.fromhex("801e0100020015000000100100800200800300800400800500800600404300") + bytes(16),
    "SSLv3": records(handshake(build(None, legacy_version=0x0300, cipher_suites=[4, 5])), version=b"\x03\x00"),
    "TLS 1.0": records(handshake(build(None, legacy_version=0x0301, cipher_suites=[0xC013, 0x2F]))),
    "oversized record": b"\x16\x03\x01\x7f\xff" + bytes(0x7FFF),
    "endless records": b"".join(records(bytes((part,))) for part in handshake(bytes(8000))),
    "empty server name": records(handshake(build(server_name(b"")))),
    "address as server name": records(handshake(build(server_name(b"127.0.0.1")))),
    "300 bytes of server name": records(handshake(build(server_name(b"a" * 300)))),
    "NUL in server name": records(handshake(build(server_name(b"a.test\0.evil.test")))),
    "no cipher in common": records(handshake(build(b"", cipher_suites=[0x0005]))),
    "garbage for a hello": records(handshake(bytes(range(256)))),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
async def test_bad_input_gets_an_alert_and_one_line_in_the_log(
    serve: Serve, leaf: Leaf, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    caplog.set_level(logging.DEBUG, logger="rama_ebpf")
    running = serve(terminating(echo, ServerTls(), leaf))
    reader, writer = await running.connect()
    writer.write(data)
    got = await reader.read()
    writer.close()
    assert re.fullmatch(rb"\x15\x03[\x00-\x03]\x00\x02\x02.", got, re.DOTALL), got
    await running.server.drain(10)
    records = [record for record in caplog.records if record.name.startswith("rama_ebpf")]
    assert len(records) == 1
    assert records[0].levelno == logging.INFO
    assert records[0].exc_info is None


async def test_plain_http_on_the_tls_port_goes_to_the_configured_fallback(
    serve: Serve, run: Run, leaf: Leaf, authority: Authority
) -> None:
    async def redirect(stream: Stream) -> None:
        await stream.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 13\r\n\r\nspeak https!\n")

    store = CertificateStore.of_files(ServerTls(), key_pair(leaf))
    running = serve(stack(TlsPeekLayer(fallback=redirect), TlsTerminateLayer(store), answer))
    _, plain, _ = await run("curl", "-sS", f"http://{HOST}:{running.port}/")
    assert plain == "speak https!\n"
    code, _, _ = await run(
        *("curl", "-sS", "--cacert", authority.certificate),
        *("--connect-to", f"::{HOST}:{running.port}", "https://a.test/"),
    )
    assert code == 0


async def test_what_the_peek_layer_saw_is_not_added_twice(serve: Serve, leaf: Leaf, trust: ssl.SSLContext) -> None:
    hellos: list[ClientHello] = []

    async def inner(stream: Stream) -> None:
        hellos.extend(stream.extensions.all(ClientHello))

    store = CertificateStore.of_files(ServerTls(), key_pair(leaf))
    running = serve(stack(TlsPeekLayer(), TlsTerminateLayer(store), inner))
    _, writer = await asyncio.open_connection(HOST, running.port, ssl=trust, server_hostname="a.test")
    writer.close()
    await writer.wait_closed()
    await running.idle()
    assert [hello.server_name for hello in hellos] == ["a.test"]


async def test_the_key_log_holds_what_wireshark_needs(
    serve: Serve, leaf: Leaf, trust: ssl.SSLContext, tmp_path: Path
) -> None:
    running = serve(terminating(echo, ServerTls(key_log=tmp_path / "keys"), leaf))
    _, writer = await asyncio.open_connection(HOST, running.port, ssl=trust, server_hostname="a.test")
    writer.close()
    await writer.wait_closed()
    await running.idle()
    assert "CLIENT_TRAFFIC_SECRET_0 " in (tmp_path / "keys").read_text()
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600

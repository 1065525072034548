"""The main job from end to end: a real client, the real command, a real web server, on real wires."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import StartProxy
from tests.lab import Host, Lab, wait_for
from tests.proxy import ProxyProcess, rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT = 1080
PAGE = "<h1>the page of a real web server</h1>\n"


@dataclass
class Net:
    proxy: ProxyProcess
    server: Host
    client: Host
    target: Host

    def curl(self, url: str, *args: str, proxy: str | None = None) -> subprocess.CompletedProcess[str]:
        where = proxy or f"{self.server.ipv4}:{PORT}"
        return self.client.run(
            "curl", "--silent", "--show-error", "--max-time", "20", "--socks5-hostname", where, *args, url, check=False
        )


@pytest.fixture
def net(lab: Lab, start_proxy: StartProxy) -> Net:
    server, client, target = lab.host("proxy"), lab.host("client"), lab.host("target")
    proxy = start_proxy(
        server,
        *("--listen", f"{server.ipv4}:{PORT}", "--listen", f"[{server.ipv6}]:{PORT}"),
        *("--allow-egress", "198.18.0.0/15", "--allow-egress", "2001:db8::/32", "--allow-egress", "127.0.0.0/8"),
        *("--allow-egress", "::1", "--handshake-timeout", "1.5"),
    )
    return Net(proxy, server, client, target)


def nginx(host: Host, where: Path) -> None:
    """Start nginx on port 80 of a lab host, both families."""
    (where / "page").mkdir(parents=True)
    (where / "page" / "index.html").write_text(PAGE, encoding="utf-8")
    (where / "nginx.conf").write_text(
        f"""
        daemon off; master_process off; pid {where}/pid; error_log {where}/error.log;
        events {{}}
        http {{
            access_log off; client_body_temp_path {where}/body; proxy_temp_path {where}/p;
            fastcgi_temp_path {where}/f; uwsgi_temp_path {where}/u; scgi_temp_path {where}/s;
            server {{ listen 80; listen [::]:80; root {where}/page; }}
        }}
        """,
        encoding="utf-8",
    )
    where.chmod(0o755)
    host.popen("nginx", "-c", str(where / "nginx.conf"), stderr=subprocess.DEVNULL)

    def up() -> bool:
        try:
            host.connect("127.0.0.1", 80, timeout=1).close()
        except ConnectionRefusedError:
            return False
        return True

    wait_for(up, what="nginx")


def test_curl_gets_a_page_by_ipv4_ipv6_and_domain(net: Net, tmp_path: Path) -> None:
    nginx(net.target, tmp_path / "target")
    nginx(net.server, tmp_path / "server")
    for url in (f"http://{net.target.ipv4}/", f"http://[{net.target.ipv6}]/", "http://localhost/"):
        assert net.curl(url).stdout == PAGE, url
        assert net.curl(url, proxy=f"[{net.server.ipv6}]:{PORT}").stdout == PAGE, url


def test_one_port_speaks_socks_http_and_tls(net: Net, tmp_path: Path) -> None:
    nginx(net.target, tmp_path / "target")
    url, address = f"http://{net.target.ipv4}/", f"{net.server.ipv4}:{PORT}"
    common = ("curl", "--silent", "--show-error", "--max-time", "20")
    for scheme in ("socks4", "socks4a", "socks5", "socks5h", "http"):
        result = net.client.run(*common, "--proxy", f"{scheme}://{address}", url, check=False)
        assert result.stdout == PAGE, (scheme, result.stderr)
    tunnelled = net.client.run(*common, "--proxytunnel", "--proxy", f"http://{address}", url, check=False)
    assert tunnelled.stdout == PAGE, tunnelled.stderr
    # A TLS client is passed through to port 443 of the name in its ClientHello.
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    request = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost")
    subprocess.run([*request, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    serve = ("openssl", "s_server", "-accept", "443", "-key", key, "-cert", certificate, "-www", "-quiet")
    net.server.popen(*serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def page_over_tls() -> bool:
        connect = ("--connect-to", f"localhost:443:{address}", "--cacert", certificate, "https://localhost/")
        return "s_server" in net.client.run(*common, *connect, check=False).stdout

    wait_for(page_over_tls, what="a page over TLS")


def test_egress_to_private_ranges_is_refused_unless_the_operator_names_them(lab: Lab, start_proxy: StartProxy) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    start_proxy(server, "--listen", f"{server.ipv4}:{PORT}")
    targets = [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "192.168.1.1",
        "198.18.0.2",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[fd00:ec2::254]",
        "[64:ff9b::7f00:1]",
        "localhost",
    ]
    for target in targets:
        result = client.run(
            *("curl", "--silent", "--show-error", "--max-time", "10"),
            *("--socks5-hostname", f"{server.ipv4}:{PORT}", f"http://{target}/"),
            check=False,
        )
        assert result.returncode == 97, (target, result.stderr)
        # curl names the reply code: 2 is "connection not allowed by ruleset" (RFC 1928 section 6).
        assert "(2)" in result.stderr, (target, result.stderr)


def _socks_connect(net: Net, port: int) -> socket.socket:
    sock = net.client.connect(net.server.ipv4, PORT)
    sock.settimeout(60)
    sock.sendall(b"\x05\x01\x00")
    assert _exactly(sock, 2) == b"\x05\x00"
    sock.sendall(b"\x05\x01\x00\x01" + socket.inet_aton(net.target.ipv4) + port.to_bytes(2, "big"))
    assert _exactly(sock, 10)[:2] == b"\x05\x00"
    return sock


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, f"stream ended after {data!r}"
        data += more
    return data


@pytest.fixture
def listener(net: Net) -> Iterator[socket.socket]:
    with net.target.socket() as sock:
        sock.bind((net.target.ipv4, 0))
        sock.listen()
        sock.settimeout(30)
        yield sock


def _send(sock: socket.socket, seed: int, size: int) -> bytes:
    """Send random bytes, half-close, return their digest."""
    source, digest = random.Random(seed), hashlib.sha256()
    while size:
        chunk = source.randbytes(min(size, 1 << 16))
        digest.update(chunk)
        sock.sendall(chunk)
        size -= len(chunk)
    sock.shutdown(socket.SHUT_WR)
    return digest.digest()


def _receive(sock: socket.socket) -> tuple[int, bytes]:
    digest, total = hashlib.sha256(), 0
    while data := sock.recv(1 << 18):
        digest.update(data)
        total += len(data)
    return total, digest.digest()


def test_100_mb_both_ways_arrive_byte_exact(net: Net, listener: socket.socket) -> None:
    size = 100_000_000
    with _socks_connect(net, listener.getsockname()[1]) as client:
        upstream, _ = listener.accept()
        with upstream:
            upstream.settimeout(60)
            sent: dict[str, bytes] = {}
            senders = [
                threading.Thread(target=lambda: sent.update(up=_send(client, 1, size))),
                threading.Thread(target=lambda: sent.update(down=_send(upstream, 2, size))),
            ]
            received: dict[str, tuple[int, bytes]] = {}
            receivers = [
                threading.Thread(target=lambda: received.update(up=_receive(upstream))),
                threading.Thread(target=lambda: received.update(down=_receive(client))),
            ]
            for thread in senders + receivers:
                thread.start()
            for thread in senders + receivers:
                thread.join(90)
            assert received == {way: (size, digest) for way, digest in sent.items()}
            assert set(received) == {"up", "down"}


def test_client_that_half_closes_still_gets_the_whole_answer(net: Net, listener: socket.socket) -> None:
    with _socks_connect(net, listener.getsockname()[1]) as client:
        upstream, _ = listener.accept()
        with upstream:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            assert _receive(upstream)[0] == len(b"question")
            upstream.settimeout(60)
            with ThreadPoolExecutor(1) as pool:  # what no buffer holds is sent while the client reads
                sending = pool.submit(_send, upstream, 3, 20_000_000)
                received = _receive(client)
                assert received == (20_000_000, sending.result())


def test_bad_clients_get_the_right_reply_one_log_line_and_leak_nothing(net: Net) -> None:
    before = net.proxy.descriptors()
    cases = [
        (b"\x05\x01\x02", b"\x05\xff"),  # no acceptable method
        (b"\x05\x01\x00\x05\x09\x00\x01\x7f\x00\x00\x01\x00\x50", b"\x05\x00\x05\x07"),  # unknown command
        (b"\x05\x01\x00\x05\x01\x00\x09\x7f\x00\x00\x01\x00\x50", b"\x05\x00\x05\x08"),  # unknown address type
        (b"\x00\x01\x02\x03", b""),  # no protocol at all
    ]
    for request, reply in cases:
        with net.client.connect(net.server.ipv4, PORT) as sock:
            sock.sendall(request)
            answer = b""
            try:
                while data := sock.recv(100):
                    answer += data
            except ConnectionResetError:
                pass
            assert answer.startswith(reply), (request, answer)
            assert bool(answer) == bool(reply)
    started = time.monotonic()
    with net.client.connect(net.server.ipv4, PORT) as silent:
        silent.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b""
        assert time.monotonic() - started >= 1.0
    # One more stays: the server holds the map of the set in force from its first look at it on.
    wait_for(lambda: net.proxy.descriptors() <= before + 1, what="the closing of descriptors")
    assert not net.proxy.logged("Traceback")
    # Of no protocol: refused before there was a task, and not a line of its own but one a minute.
    wait_for(lambda: sum("rama_ebpf.access" in line for line in net.proxy.log) == len(cases))
    assert net.proxy.logged("connection refused: the first bytes are of no protocol that is served here")


@pytest.mark.parametrize(
    ("arguments", "names", "remedy"),
    [
        (["block", "198.18.0.300"], "198.18.0.300", "write for example"),
        (["block", "198.18.0.1/8"], "198.18.0.1/8", "198.0.0.0/8"),
        (["block", "198.18.0.1", "--ttl", "soon"], "soon", "1h"),
        (["block", "198.18.0.1", "--ttl", "0"], "'0'", "1 second"),
        (["block", "198.18.0.1", "--port", "70000"], "70000", "1 to 65535"),
        (["block", "198.18.0.1", "--port", "http"], "http", "--help"),
        (["test", "198.18.0.1:0"], "0", "1 to 65535"),
        (["test", "example"], "example", "write for example"),
        (["unblock", "nonsense"], "nonsense", "write for example"),
    ],
)
def test_bad_input_is_one_line_with_value_and_remedy(net: Net, arguments: list[str], names: str, remedy: str) -> None:
    before = net.proxy.json("list")
    command, *rest = arguments
    result = net.proxy.command(command, *rest, check=False)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert names in result.stderr
    assert remedy in result.stderr
    assert net.proxy.json("list") == before


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--listen", "127.0.0.1"], "127.0.0.1"),
        (["--listen", "127.0.0.1:99999"], "127.0.0.1:99999"),
        (["--listen", "localhost:1080"], "localhost:1080"),
        (["--allow-egress", "10.0.0.1/8"], "10.0.0.1/8"),
        (["--failsafe", "everywhere"], "everywhere"),
        (["--idle-timeout", "-1"], "-1"),
        (["--instance", "../x"], "../x"),
        (["--max-rules", "1"], "'1'"),
    ],
)
def test_bad_run_arguments_are_one_line_and_load_nothing(lab: Lab, arguments: list[str], names: str) -> None:
    result = lab.host("proxy").run(ProxyProcess.COMMAND, "run", *arguments, check=False)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert names in result.stderr


def test_occupied_port_is_said_and_leaves_nothing(lab: Lab, instance: str) -> None:
    host = lab.host("proxy")
    with host.socket() as other:
        other.bind((host.ipv4, PORT))
        other.listen()
        arguments = ("run", "--instance", instance, "--listen", f"{host.ipv4}:{PORT}")
        result = host.run(ProxyProcess.COMMAND, *arguments, check=False)
    assert result.returncode == 3
    assert f"{host.ipv4} port {PORT}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def unprivileged_home() -> Iterator[Path]:
    """A directory of nobody's. Not below pytest's own, which every pytest run beside this one closes to others."""
    with tempfile.TemporaryDirectory(prefix="rama-ebpf-home-") as home:
        os.chown(home, 65534, 65534)
        yield Path(home)


def _as_nobody(home: Path, *args: str) -> list[str]:
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", f"XDG_RUNTIME_DIR={home}", *args]


def _command_as_nobody(home: Path, *args: str) -> str:
    command = _as_nobody(home, ProxyProcess.COMMAND, *args)
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, (args, result.stderr)
    return result.stdout


def test_without_privileges_policy_is_local_and_says_so(lab: Lab, unprivileged_home: Path, tmp_path: Path) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    nobody = lambda *args: _as_nobody(unprivileged_home, ProxyProcess.COMMAND, *args)  # noqa: E731
    refused = server.run(*nobody("run", "--require-kernel"), check=False)
    assert refused.returncode == 3
    assert len(refused.stderr.strip().splitlines()) == 1
    unasked = server.run(*nobody("run", "--listen", f"{server.ipv4}:{PORT}"), check=False)
    assert unasked.returncode == 3
    assert f"Listeners that need it: main ({server.ipv4}:{PORT})" in unasked.stderr

    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as stderr:
        process = server.popen(*nobody("run", "--gate", "optional", "--listen", f"{server.ipv4}:{PORT}"), stderr=stderr)
    try:
        wait_for(lambda: "ready after" in log.read_text(encoding="utf-8"), timeout=60, what="readiness")
    except AssertionError:
        pytest.fail(f"not ready (exit code {process.poll()}):\n{log.read_text(encoding='utf-8')}")
    loud = [line for line in log.read_text(encoding="utf-8").splitlines() if "POLICY IS NOT IN THE KERNEL" in line]
    assert len(loud) == 1

    def greet() -> bytes:
        try:
            with client.connect(server.ipv4, PORT) as sock:
                sock.sendall(b"\x05\x01\x00")
                return sock.recv(2)
        except ConnectionResetError:
            return b""

    assert greet() == b"\x05\x00"
    _command_as_nobody(unprivileged_home, "block", client.ipv4)
    assert greet() == b""
    listed = _command_as_nobody(unprivileged_home, "list", "--json")
    assert '"hits": 1' in listed
    assert '"store": "local"' in listed
    status = _command_as_nobody(unprivileged_home, "status", "--json")
    assert '"policy": "local"' in status
    assert "NOT GUARDED: there is no gate in the kernel" in status
    _command_as_nobody(unprivileged_home, "unblock", client.ipv4)
    assert greet() == b"\x05\x00"
    process.terminate()
    assert process.wait(30) == 0


def test_sigterm_lets_a_tunnel_finish_and_a_second_cuts(net: Net, listener: socket.socket) -> None:
    with _socks_connect(net, listener.getsockname()[1]) as client:
        upstream, _ = listener.accept()
        with upstream:
            net.proxy.signal(15)
            wait_for(lambda: net.proxy.logged("stopping: connections have"))
            upstream.sendall(b"still here")
            assert _exactly(client, 10) == b"still here"
            net.proxy.signal(15)
            assert net.proxy.wait(15) == 0
            with pytest.raises(ConnectionResetError):
                client.recv(1)


def test_doctor_finds_this_host_ready() -> None:
    result = rama_ebpf("doctor")
    for subject in ("privileges", "kernel", "cgroup v2", "bpffs", "kernel BTF", "headers", "BCC"):
        assert f"ok    {subject}:" in result.stdout, result.stdout


def test_wheel_carries_the_c_sources(tmp_path: Path) -> None:
    import sys
    import zipfile

    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for source in (root / "bpf").glob("*.[ch]"):
        assert f"rama_ebpf/_bpf/{source.name}" in names
    assert "rama_ebpf/py.typed" in names

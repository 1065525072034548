from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..lab import Host
from ..tls.pki import Authority
from .conftest import RunExample

ORIGIN = """
import gzip, http.server, json, ssl, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = gzip.compress(json.dumps({"news": ["one"], "ads": ["buy"]}).encode())
        self.send_response(200)
        for field in ("Content-Type: application/json", "Content-Encoding: gzip", f"Content-Length: {len(body)}"):
            self.send_header(*field.split(": "))
        self.end_headers()
        self.wfile.write(body)
server = http.server.HTTPServer(("127.0.0.1", 8443), Page)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])
server.socket = context.wrap_socket(server.socket, server_side=True)
print("ready", flush=True)
server.serve_forever()
"""


def test_json_is_rewritten_inside_tls_and_what_passed_is_saved(
    run_example: RunExample, directory: Path, host: Host, tmp_path: Path, curl, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki = tmp_path / "pki"
    pki.mkdir()
    authority = Authority(pki)
    leaf = authority.issue("127.0.0.1")
    origin = host.popen(sys.executable, "-c", ORIGIN, str(leaf.chain), str(leaf.key), stdout=subprocess.PIPE)
    assert origin.stdout is not None
    assert origin.stdout.readline() == "ready\n"
    shutil.copy(authority.certificate, directory / "upstream.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(directory / "upstream.pem"))
    command = str(Path(sys.executable).with_name("rama-ebpf"))
    ca = [command, "ca", "create", "--cert", str(directory / "ca.pem"), "--key", str(directory / "ca.key")]
    subprocess.run(ca, check=True, capture_output=True)
    proxy = run_example("rewrite_json:proxy", "--allow-egress", "127.0.0.1", "--sandbox-write", str(directory))
    directory.chmod(0o777)  # workers are another user
    through = ("--socks5-hostname", "127.0.0.1:1080", "--cacert", str(directory / "ca.pem"), "--compressed")
    assert json.loads(curl(*through, "https://127.0.0.1:8443/").stdout) == {"news": ["one"]}
    proxy.signal(signal.SIGTERM)
    assert proxy.wait() == 0
    saved = [json.loads(path.read_text())["log"]["entries"] for path in directory.glob("traffic-*.har")]
    assert saved, proxy.log
    (entry,) = [one for entries in saved for one in entries]
    assert entry["request"]["url"] == "https://127.0.0.1:8443/"
    assert json.loads(entry["response"]["content"]["text"]) == {"news": ["one"]}

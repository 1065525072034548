"""Bulk over TLS: GB per CPU second of the terminating proxy: ``python -m bench.tls_bulk [GIB]``.

``down``: curl fetches a file of zeros from nginx behind the proxy. ``up``: curl uploads it to a backend that drops it.
The cipher is AES-128-GCM in TLS 1.3.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.tls.pki import Authority

from .tls_servers import NAMES, Contestant, free_port, serving, spread

ROUNDS = 3

_NGINX = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    sendfile on;
    client_max_body_size 0;
    client_body_temp_path {directory}/body;
    server {{
        listen 127.0.0.1:{port};
        root {directory};
    }}
}}
"""

_SINK = """
import socket, sys, threading
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    connection, _ = listener.accept()
    buffer = bytearray(1 << 20)
    head = connection.recv(65536)
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\\r\\n")[0])
    if b"100-continue" in head:
        connection.sendall(b"HTTP/1.1 100 Continue\\r\\n\\r\\n")
    length -= len(head.partition(b"\\r\\n\\r\\n")[2])
    while length > 0:
        length -= connection.recv_into(buffer)
    connection.sendall(b"HTTP/1.1 204 Done\\r\\nConnection: close\\r\\n\\r\\n")
    connection.close()
"""


@contextlib.contextmanager
def backends(directory: str) -> Iterator[tuple[int, int]]:
    """Start nginx and the sink; yield their ports."""
    nginx, sink = free_port(), free_port()
    config = Path(directory, "nginx.conf")
    config.write_text(_NGINX.format(directory=directory, port=nginx))
    with (
        subprocess.Popen(["nginx", "-c", str(config), "-p", directory]) as first,
        subprocess.Popen([sys.executable, "-c", _SINK, str(sink)]) as second,
    ):
        time.sleep(1)
        try:
            yield nginx, sink
        finally:
            first.terminate()
            second.kill()


def transfer(server: Contestant, size: int, *arguments: str) -> tuple[float, float]:
    """Return GB per second, and per CPU second of the server."""
    before, started = server.cpu(), time.monotonic()
    subprocess.run(
        ["curl", "-ksS", "--tls13-ciphers", "TLS_AES_128_GCM_SHA256", "-o", "/dev/null", "--fail", *arguments],
        check=True,
    )
    return size / 1e9 / (time.monotonic() - started), size / 1e9 / (server.cpu() - before)


def main() -> None:
    size = (int(sys.argv[1]) if len(sys.argv) > 1 else 2) << 30
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        leaf = Authority(Path(directory)).issue("bench.test")
        file = Path(directory, "zeros")
        with file.open("wb") as zeros:
            zeros.truncate(size)
        with backends(directory) as (nginx, sink):
            print(f"{'':10}{'':>6}{'GB/s':>20}{'GB per CPU second':>20}")
            for direction in ("down", "up"):
                backend, more = (nginx, ()) if direction == "down" else (sink, ("-T", str(file)))
                rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
                for _ in range(ROUNDS):
                    for name in NAMES:
                        with serving(name, backend, leaf.chain, leaf.key) as server:
                            url = f"https://127.0.0.1:{server.port}/zeros"
                            rounds[name].append(transfer(server, size, *more, url))
                for name in NAMES:
                    wall, cpu = (spread(column, 2) for column in zip(*rounds[name], strict=True))
                    print(f"{name:10}{direction:>6}{wall:>20}{cpu:>20}", flush=True)


if __name__ == "__main__":
    main()

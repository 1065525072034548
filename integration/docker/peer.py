"""What the containers around the proxy run: an echo server and SOCKS5 clients. The standard library alone.

Usage: peer.py echo PORT
       peer.py exchange PROXY PORT TARGET PORT BYTES SEED [FILE]
       peer.py attempt ADDRESS PORT SECONDS
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import socketserver
import sys
import threading
import time
from pathlib import Path


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1 << 16):
            self.request.sendall(data)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64


def echo(port: str) -> None:
    """Send back what comes, until the peer half-closes."""
    with _Server(("0.0.0.0", int(port)), _Echo) as server:
        server.serve_forever()


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError(f"the stream ended after {data!r}")
        data += more
    return data


def exchange(proxy: str, proxy_port: str, target: str, port: str, size: str, seed: str, signal: str = "") -> None:
    """Through the proxy: send random bytes, half-close, and compare what comes back.

    With ``signal``, the first half is sent, and the second when a file of this name is there.
    """
    sent, received = hashlib.sha256(), hashlib.sha256()
    source, left, back = random.Random(int(seed)), int(size), 0
    with socket.create_connection((proxy, int(proxy_port)), timeout=60) as sock:
        sock.sendall(b"\x05\x01\x00")
        assert _exactly(sock, 2) == b"\x05\x00"
        sock.sendall(b"\x05\x01\x00\x01" + socket.inet_aton(target) + int(port).to_bytes(2, "big"))
        reply = _exactly(sock, 10)
        assert reply[:2] == b"\x05\x00", reply

        def send() -> None:
            nonlocal left
            while left:
                chunk = source.randbytes(min(left, int(size) // 16 + 1))
                sent.update(chunk)
                sock.sendall(chunk)
                left -= len(chunk)
                while left < int(size) // 2 and signal and not Path(signal).exists():
                    time.sleep(0.05)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while data := sock.recv(1 << 16):
            received.update(data)
            back += len(data)
        sender.join()
    print(json.dumps({"sent": int(size) - left, "received": back, "exact": sent.digest() == received.digest()}))


def attempt(address: str, port: str, seconds: str) -> None:
    """Say what became of one connect(2)."""
    try:
        socket.create_connection((address, int(port)), timeout=float(seconds)).close()
    except TimeoutError:
        print("no answer")
    except ConnectionRefusedError:
        print("refused")
    else:
        print("connected")


if __name__ == "__main__":
    {"echo": echo, "exchange": exchange, "attempt": attempt}[sys.argv[1]](*sys.argv[2:])

"""A name server of the tests' own, on UDP and TCP port 53 of a loopback address, that does what the name says."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Final, Self

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

A: Final = dns.rdatatype.A


class NameServer:
    """Names under ``.test``, by their first label; ``asked`` counts the questions, as ``name/type``."""

    def __init__(self, address: str, *, silent: bool = False) -> None:
        self.address = address
        self.silent = silent
        self.ttl = 300
        self.asked: Counter[str] = Counter()
        self.over_tcp = 0
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind((address, 53))
        self._tcp = socket.socket()
        self._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._tcp.bind((address, 53))
        self._tcp.listen()
        self._threads = [threading.Thread(target=self._serve_udp), threading.Thread(target=self._serve_tcp)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._udp, self._tcp):
            with contextlib.suppress(OSError):  # an unconnected UDP socket says ENOTCONN, and wakes its reader
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._udp.close()
        self._tcp.close()

    def _serve_udp(self) -> None:
        while data := self._udp.recvfrom(4096):
            if not data[0]:
                return
            for wire in self._replies(data[0], tcp=False):
                self._udp.sendto(wire, data[1])

    def _serve_tcp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._tcp.accept()
                with connection:
                    self.over_tcp += 1
                    length = int.from_bytes(connection.recv(2), "big")
                    for wire in self._replies(connection.recv(length), tcp=True):
                        connection.sendall(len(wire).to_bytes(2, "big") + wire)

    def _replies(self, data: bytes, *, tcp: bool) -> Iterator[bytes]:
        query = dns.message.from_wire(data)
        question = query.question[0]
        kind, name = question.rdtype, question.name.to_text(omit_final_dot=True).lower()
        self.asked[f"{name}/{dns.rdatatype.to_text(kind)}"] += 1
        verb = name.partition(".")[0].rstrip("0123456789")
        if self.silent or verb == "silent" or (verb == "noaaaa" and kind != A):
            return
        response = dns.message.make_response(query)
        answer = response.answer

        def add(owner: str, type_: str, *texts: str) -> None:
            answer.append(dns.rrset.from_text(owner + ".", self.ttl, "IN", type_, *texts))

        def address(owner: str) -> None:
            add(owner, "A", "127.0.0.1") if kind == A else add(owner, "AAAA", "::1")

        if verb in ("good", "my_host", "noaaaa"):
            address(name)
        elif verb == "alias":
            add(name, "CNAME", "good.test.")
            address("good.test")
        elif verb == "loop":
            add(name, "CNAME", "pool.test.")
            add("pool.test", "CNAME", name + ".")
        elif verb == "empty":
            pass
        elif verb == "servfail" or (verb == "halffail" and kind != A):
            response.set_rcode(dns.rcode.SERVFAIL)
        elif verb == "halffail":
            address(name)
        elif verb == "noedns":
            if query.edns >= 0:
                response = dns.message.make_response(query)
                response.set_rcode(dns.rcode.FORMERR)
            else:
                address(name)
        elif verb == "many" and kind == A:
            if tcp:
                add(name, "A", *(f"127.0.1.{number}" for number in range(1, 200)))
            else:
                response.flags |= dns.flags.TC
        elif verb == "huge":
            if tcp:
                add(name, "A", *(f"127.{number >> 8}.{number & 255}.9" for number in range(4000)))
            else:
                response.flags |= dns.flags.TC
        elif verb == "forged":
            address(name)
            forged = bytearray(response.to_wire().replace(b"\x7f\0\0\1", b"\x7f\0\0\6"))
            forged[0] ^= 0xFF  # another id
            yield bytes(forged)
            yield b"\0" * 5
            other = dns.message.make_response(query)
            other.question = dns.message.make_query("other.test.", kind).question
            yield other.to_wire()
            yield response.to_wire()[:20]
        else:
            response.set_rcode(dns.rcode.NXDOMAIN)
        yield response.to_wire(max_size=65535)

"""What is a strike: the table is complete, the documentation is written from it, and errors find their row."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import rama_ebpf
from rama_ebpf.core.blame import BLAME, Blame, judge, markdown, speaks_another_protocol
from rama_ebpf.core.errors import AuthFailed, Busy, HandshakeTimeout, PeerClosed, ProtocolError, RamaError
from rama_ebpf.core.shares import Held, SourceShare
from rama_ebpf.services.http import HttpServer, Request, Response
from rama_ebpf.services.http.h1.heads import head_end, parse_request
from rama_ebpf.services.http.message.errors import AmbiguousMessage, MalformedMessage
from rama_ebpf.services.http.message.limits import HttpLimits
from rama_ebpf.services.protocols import is_http
from rama_ebpf.services.router import PeekRouter
from rama_ebpf.services.socks5.machine import ServerMachine
from rama_ebpf.services.socks5.wire import Method
from rama_ebpf.services.tls.client_hello import ClientHelloParser

ROOT = Path(__file__).parents[2]

SERVER_SIDE = {
    "config",
    "feed",
    "gate",
    "in_force",
    "kernel",
    "landlock",
    "local",
    "password_file",
    "plan",
    "policy",
    "queue_full",
    "request_failed",
    "route",
    "sandbox",
    "seccomp",
    "stack",
    "stopping",
    "target",
    "too_many_bans",
    "too_many_ways",
    "upgrade_failed",
    "user",
    "workers_failed",
}
"""Kinds that concern operators: none ends a client's connection."""


def _errors() -> set[type[RamaError]]:
    for module in pkgutil.walk_packages(rama_ebpf.__path__, "rama_ebpf."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: set[type[RamaError]] = set()
    todo = [RamaError]
    while todo:
        error = todo.pop()
        if error.__module__.startswith("rama_ebpf."):
            found.add(error)
        todo += error.__subclasses__()
    return found


def test_each_kind_of_error_has_its_row() -> None:
    kinds = {error.kind for error in _errors()}
    assert kinds - SERVER_SIDE - BLAME.keys() == set(), "write a row in core/blame.py: who is to blame?"
    assert not SERVER_SIDE & BLAME.keys()


def _kinds_in(node: ast.expr) -> set[str]:
    """The texts that an expression can be: ``"a" if … else "b"`` is two."""
    return {found.value for found in ast.walk(node) if isinstance(found, ast.Constant) and isinstance(found.value, str)}


def _kinds_given() -> dict[str, str]:
    """Each kind that is given to an error when it is made, or to a refusal by first bytes, and where."""
    errors = {error.__name__ for error in _errors()}
    given: dict[str, str] = {}
    for path in (ROOT / "rama_ebpf").rglob("*.py"):
        text = path.read_text()
        by_first_bytes = "first_bytes import" in text or path.stem == "first_bytes"
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            kinds: set[str] = set()
            if name == "Refused" and by_first_bytes and node.args:
                kinds = _kinds_in(node.args[0])
            elif name in errors or name == "_malformed" or (name == "__init__" and "errors" in path.name):
                kinds = {kind for word in node.keywords if word.arg == "kind" for kind in _kinds_in(word.value)}
            given |= dict.fromkeys(kinds, f"{path.relative_to(ROOT)}:{node.lineno}")
    return given


def test_each_kind_that_an_error_is_given_has_its_row() -> None:
    given = _kinds_given()
    assert given.keys() >= {"wrong_protocol", "auth_absent", "peer_closed", "source_queue", "tls_not_served"}
    missing = {kind: where for kind, where in given.items() if kind not in BLAME and kind not in SERVER_SIDE}
    assert missing == {}, "write a row in core/blame.py: who is to blame?"


def test_each_refusal_of_a_share_has_its_row_and_is_no_strike() -> None:
    for held in Held:
        found = judge(SourceShare(held, 1).refusal())
        assert found is BLAME[held.value]
        assert not found.strikes


def test_each_row_is_of_a_kind_that_is_raised() -> None:
    kinds = {error.kind for error in _errors()}
    sources = "\n".join(path.read_text() for path in (ROOT / "rama_ebpf/services").rglob("*.py"))
    sources += (ROOT / "rama_ebpf/layers/auth.py").read_text()
    sources += (ROOT / "rama_ebpf/core/shares.py").read_text()
    assert [kind for kind in BLAME if kind not in kinds and f'"{kind}"' not in sources] == []


def test_documentation_has_the_table_as_the_code_has_it() -> None:
    text = (ROOT / "docs/layers.md").read_text()
    assert "\n".join(markdown()) in text, "run: .venv/bin/python -m rama_ebpf.core.blame docs/layers.md"


def test_an_error_of_ones_own_is_judged_as_its_base() -> None:
    class Mine(ProtocolError):
        kind = "mine"

    found = judge(Mine("nonsense"))
    assert found is BLAME["protocol"]
    assert judge(ValueError()) is None


def test_what_we_owe_and_silence_are_no_strikes() -> None:
    for error in (Busy("queue"), HandshakeTimeout("slow"), PeerClosed("gone"), AuthFailed("none", kind="auth_absent")):
        judgement = judge(error)
        assert judgement is not None
        assert not judgement.strikes
    assert BLAME[AuthFailed.kind].blame is Blame.ABUSE


def test_tls_that_comes_in_pieces_to_a_port_of_http_is_no_strike() -> None:
    hello = bytearray(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    with pytest.raises(MalformedMessage) as caught:
        head_end(hello, 0, HttpLimits(), request=True)
    judgement = judge(caught.value)
    assert judgement is not None
    assert not judgement.strikes


_LIMITS = HttpLimits()
_HOST = b"Host: a.test\r\n"


def _http(data: bytes) -> str:
    with pytest.raises(MalformedMessage) as caught:
        parse_request(data, _LIMITS)
    judgement = judge(caught.value)
    assert judgement is not None
    return "strike" if judgement.strikes else "no"


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + _HOST + b"\r\n",
        "GET /ü HTTP/1.1\r\n".encode() + _HOST + b"\r\n",
        b"GET /a b HTTP/1.1\r\n" + _HOST + b"\r\n",
        b"GET / HTTP/1.1\r\n" + _HOST + b"X: a\r\n" * 500 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: a_b c\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"\x05\x02\x00\x02\r\n\r\n",
        b"\x04\x01\x00\x50\x01\x02\x03\x04\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=["414", "raw UTF-8", "blank in target", "431", "bad Host", "no Host", "TLS", "SOCKS5", "SOCKS4", "h2 preface"],
)
def test_what_a_web_page_can_make_a_browser_send_is_no_strike(data: bytes) -> None:
    assert _http(data) == "no"


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\n" + _HOST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + _HOST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + _HOST + _HOST + b"\r\n",
        b"\xff\xfe\xfd\xfc\r\n\r\n",
    ],
    ids=["length and coding", "two lengths", "two hosts", "noise"],
)
def test_what_no_browser_sends_is_a_strike(data: bytes) -> None:
    assert _http(data) == "strike"


def test_ambiguous_messages_are_malformed_ones() -> None:
    assert issubclass(AmbiguousMessage, MalformedMessage)
    assert AmbiguousMessage("x").status == 400


@pytest.mark.parametrize(
    ("data", "strikes"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", False),
        (b"\x16\x03\x01\x02\x00", False),
        (b"\x00\x03\x00\x08\x21\x12\xa4\x42", False),  # a TURN server of WebRTC, over TCP
        (b"\x05\x01\x00\x05\x02\x00\x01" + bytes(6), False),  # BIND
        (b"\x05\x01\x00\x05\x01\x00\x03\x03a b\0\x50", False),  # a host name of a web page
        (b"\x05\x01\x02", False),  # offers what is not taken
        (b"\xff\xfe\xfd", True),
        (b"\x05\x01\x00\x05\x09\x00\x01" + bytes(6), True),
        (b"\x05\x01\x00\x05\x01\x00\x09" + bytes(6), True),
        (b"\x05\x01\x00\x04\x01\x00\x01" + bytes(6), True),
    ],
)
def test_socks_strikes_for_what_no_socks_client_sends(data: bytes, strikes: bool) -> None:
    machine = ServerMachine([Method.NONE])

    def read(rest: bytes) -> None:
        while rest:
            _, used = machine.receive(rest)
            rest = rest[used:]

    with pytest.raises(RamaError) as caught:
        read(data)
    judgement = judge(caught.value)
    assert judgement is not None
    assert judgement.strikes is strikes


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not_tls"),
        (b"\x16\x03\x09\x00\x05", "tls_not_served"),
        (b"\x16\x03\x01\x00\x00", "tls_protocol"),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", "tls_protocol"),
    ],
)
def test_tls_strikes_for_what_breaks_the_protocol_only(data: bytes, kind: str) -> None:
    with pytest.raises(RamaError) as caught:
        ClientHelloParser(16384).feed(data)
    assert caught.value.kind == kind


@pytest.mark.parametrize("data", [b"\x05\x01\x00", b"\x05\x02\x00\x02", b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00"])
def test_wrong_kind_of_proxy_in_a_browser_s_settings_is_no_strike(data: bytes) -> None:
    async def app(_request: Request) -> Response:
        raise AssertionError

    for service in (HttpServer(app), PeekRouter((is_http, HttpServer(app)))):
        judge_first = service.first_bytes
        assert judge_first is not None
        refused = judge_first.judge(data)
        assert refused is not None
        assert not BLAME[refused.kind].strikes


def test_noise_is_of_no_other_protocol() -> None:
    assert not speaks_another_protocol(b"\x05\x00")
    assert not speaks_another_protocol(b"\x04\x09")
    assert not speaks_another_protocol(b"\xff\xff\xff\xff")
    assert not speaks_another_protocol(b"\x00" * 8)
    assert not speaks_another_protocol(b"SSH-2.0-x")
    assert not speaks_another_protocol(b"GET / HTTP/9\r\n\r\n")
    assert not speaks_another_protocol(b"GET / HTTP/\n")


@pytest.mark.parametrize(
    "line", [b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.0\n", b"PRI * HTTP/2.0\r\n", b"GET / HTTP/9", b"GET /\r\n"]
)
def test_what_may_be_a_browser_s_is_another_protocol(line: bytes) -> None:
    assert speaks_another_protocol(line)

"""Name patterns, matches, routes and policy: who wins, and what the client and the log see."""

from __future__ import annotations

import pytest

from rama_ebpf.core import IPAddress, PolicyDenied, Stream, stack
from rama_ebpf.core.names import NameMap, NameSet
from rama_ebpf.layers.policy import PolicyLayer
from rama_ebpf.layers.strikes import LocalStrikes, StrikeLayer
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.rule import Verdict
from rama_ebpf.services.tls import (
    Alert,
    AlertError,
    TlsAction,
    TlsDenied,
    TlsMatch,
    TlsPeekLayer,
    TlsPolicyLayer,
    TlsRoute,
    TlsRouter,
    TlsRule,
    TlsStrike,
)

from .conftest import Serve
from .hello import build, extension, handshake, records, server_name, vec
from .test_peek import exchange


def hello(name: bytes | None, *alpn: bytes) -> bytes:
    block = b"" if name is None else server_name(name)
    if alpn:
        block += extension(16, vec(2, b"".join(vec(1, protocol) for protocol in alpn)))
    return records(handshake(build(block)))


def answering(text: str) -> object:
    async def service(stream: Stream) -> str:
        await stream.write(text.encode())
        return text

    return service


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("example.test", "exact"),
        ("www.example.test", "below"),
        ("a.b.example.test", "below"),
        ("x.b.example.test", "below"),
        ("deep.a.b.example.test", "deep"),
        ("both.test", "both"),
        ("www.both.test", "both"),
        ("notboth.test", "any"),
        ("test", "any"),
    ],
)
def test_exact_beats_suffix_and_the_longer_suffix_wins(name: str, value: str) -> None:
    names = NameMap(
        [
            ("Example.test.", "exact"),
            ("*.example.test", "below"),
            ("*.a.b.example.test", "deep"),
            (".both.test", "both"),
            ("*", "any"),
        ]
    )
    assert names.find(name) == value


@pytest.mark.parametrize("pattern", ["", ".", "*.", "a..b", "w*.test", "*test", "a.*.test", "**"])
def test_a_pattern_that_can_match_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a pattern"):
        NameMap([(pattern, 1)])


def test_a_set_of_names_holds_no_missing_name() -> None:
    assert None not in NameSet(["*"])
    assert "a.test" in NameSet(["*"])
    assert not NameSet()


async def test_the_first_route_that_matches_gets_the_stream(serve: Serve) -> None:
    router = TlsRouter(
        [
            TlsRoute(TlsMatch(sni=["h2.test"], alpn=["h2"]), answering("h2")),
            TlsRoute(TlsMatch(sni=["*.wide.test", "h2.test"]), answering("by name")),
            TlsRoute(TlsMatch(ja4=["t12i*"]), answering("by fingerprint")),
            TlsRoute(TlsMatch(alpn=["http/1.1"]), answering("by protocol")),
        ]
    )
    running = serve(stack(TlsPeekLayer(), router))
    assert await exchange(running, hello(b"h2.test", b"http/1.1", b"h2")) == b"h2"
    assert await exchange(running, hello(b"h2.test", b"http/1.1")) == b"by name"
    assert await exchange(running, hello(b"a.b.wide.test")) == b"by name"
    assert await exchange(running, hello(None)) == b"by fingerprint"
    assert await exchange(running, hello(b"other.test", b"http/1.1")) == b"by protocol"
    assert await exchange(running, hello(b"other.test")) == Alert.UNRECOGNIZED_NAME.record
    assert [type(error) for error in running.errors] == [AlertError]


async def test_policy_allows_closes_and_strikes(serve: Serve) -> None:
    policy = TlsPolicyLayer(
        [
            TlsRule("friends", TlsMatch(sni=["good.bad.test"]), TlsAction.ALLOW),
            TlsRule("no-bad", TlsMatch(sni=[".bad.test"]), TlsAction.CLOSE),
            TlsRule("scanner", TlsMatch(ja4=["t12i0200*"]), TlsAction.STRIKE),
            TlsRule("nameless", TlsMatch(no_sni=True), TlsAction.CLOSE),
        ]
    )
    running = serve(stack(TlsPeekLayer(), policy, answering("in")))
    assert await exchange(running, hello(b"good.bad.test")) == b"in"
    assert await exchange(running, hello(b"other.test")) == b"in"
    assert await exchange(running, hello(b"www.bad.test")) == Alert.ACCESS_DENIED.record
    assert await exchange(running, hello(None, b"h2")) == Alert.ACCESS_DENIED.record
    with pytest.raises(ConnectionResetError):
        await exchange(running, hello(None))
    await running.idle()
    assert [(type(error), error.kind, error.rule) for error in running.errors if isinstance(error, PolicyDenied)] == [
        (TlsDenied, "tls_denied", "no-bad"),
        (TlsDenied, "tls_denied", "nameless"),
        (TlsStrike, "tls_strike", "scanner"),
    ]


async def test_a_policy_that_denies_by_default_names_the_default(serve: Serve) -> None:
    rules = [TlsRule("ours", TlsMatch(sni=[".ours.test"]), TlsAction.ALLOW)]
    running = serve(stack(TlsPeekLayer(), TlsPolicyLayer(rules, default=TlsAction.CLOSE), answering("in")))
    assert await exchange(running, hello(b"www.ours.test")) == b"in"
    assert await exchange(running, hello(b"theirs.test")) == Alert.ACCESS_DENIED.record
    assert [error.rule for error in running.errors if isinstance(error, TlsDenied)] == ["default"]


class Server:
    """A server's policy as its workers have it, without the channel between."""

    def __init__(self) -> None:
        self.store = LocalStore()
        self.store.set_failsafe([])  # loopback is in it by default

    async def ban(self, ip: IPAddress, /, *, ttl: float, reason: str) -> None:
        self.store.ban(ip, ttl=ttl, reason=reason)

    async def verdict(self, ip: IPAddress, port: int, /) -> Verdict:
        return self.store.verdict(ip, port)


async def test_a_struck_client_is_banned_and_its_next_connection_refused(serve: Serve) -> None:
    server = Server()
    policy = TlsPolicyLayer([TlsRule("scanner", TlsMatch(sni=["bad.test"]), TlsAction.STRIKE)])
    inside = stack(TlsPeekLayer(), policy, answering("in"))
    running = serve(stack(StrikeLayer(LocalStrikes(server), strikes=1), PolicyLayer(server), inside))
    assert await exchange(running, hello(b"good.test")) == b"in"
    for name in (b"bad.test", b"good.test"):
        with pytest.raises(ConnectionResetError):
            await exchange(running, hello(name))
    await running.idle()
    kinds = [error.kind for error in running.errors if isinstance(error, PolicyDenied)]
    assert kinds == ["tls_strike", "policy_denied"]

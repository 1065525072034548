"""Forwarded and X-Forwarded-For: who is believed, and what goes on."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from rama_ebpf.core import ClientAddress, Extensions, SocketAddress, client_address
from rama_ebpf.services.http import ForwardedField, ForwardedLayer, Headers, Request, Response

X, RFC = ForwardedField.X_FORWARDED, ForwardedField.FORWARDED
TRUSTED = ["10.0.0.0/8", "2001:db8::/32"]


async def pass_through(layer: ForwardedLayer, peer: str, *fields: tuple[str, str]) -> tuple[Request, str]:
    extensions = Extensions()
    extensions.add(ClientAddress(SocketAddress(ip_address(peer), 1234)))
    request = Request("GET", "a.test", "/", Headers(fields), extensions=extensions)
    seen: list[Request] = []

    async def app(request: Request) -> Response:
        seen.append(request)
        return Response(204)

    await layer(app)(request)
    client = client_address(seen[0])
    assert client is not None
    return seen[0], str(client.ip)


async def test_what_an_untrusted_peer_says_is_replaced() -> None:
    request, client = await pass_through(
        ForwardedLayer(X, trusted=TRUSTED),
        "192.0.2.1",
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-Real-IP", "127.0.0.1"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "b.test"),
        ("Forwarded", "for=127.0.0.1"),
        ("Accept", "*/*"),
    )
    assert client == "192.0.2.1"
    assert list(request.headers) == [
        ("Accept", "*/*"),
        ("X-Forwarded-For", "192.0.2.1"),
        ("X-Forwarded-Proto", "http"),
        ("X-Forwarded-Host", "a.test"),
    ]


@pytest.mark.parametrize(
    ("told", "client"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("127.0.0.1, 203.0.113.9", "203.0.113.9"),
        ("203.0.113.9, 10.1.1.1", "203.0.113.9"),
        ("203.0.113.9:4711, 10.1.1.1:80", "203.0.113.9"),
        ("[2001:db8:ffff::1]:80", "2001:db8:ffff::1"),
        ("2600::1, 2001:db8::7", "2600::1"),
        ("10.1.1.1, 10.1.1.2", "10.1.1.1"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("unknown, 10.1.1.1", "10.1.1.1"),
        ("203.0.113.9, nonsense", "10.0.0.1"),
        ("", "10.0.0.1"),
    ],
)
async def test_nearest_untrusted_address_of_a_trusted_peers_list_is_the_client(told: str, client: str) -> None:
    request, found = await pass_through(ForwardedLayer(X, trusted=TRUSTED), "10.0.0.1", ("X-Forwarded-For", told))
    assert found == client
    assert request.headers.get("x-forwarded-for") == f"{told}, 10.0.0.1"


@pytest.mark.parametrize(
    ("told", "client"),
    [
        ("for=203.0.113.9", "203.0.113.9"),
        ('For="[2600::1]:4711";proto=https', "2600::1"),
        ("for=127.0.0.1, for=203.0.113.9;by=10.0.0.1, for=10.2.2.2", "203.0.113.9"),
        ('for="203.0.113.9:80";host="a,b"', "203.0.113.9"),
        ("for=_hidden, for=10.1.1.1", "10.1.1.1"),
        ("for=203.0.113.9, proto=http", "10.0.0.1"),
        ("for=203.0.113.9, nonsense", "10.0.0.1"),
        ('for=203.0.113.9, for="10.1.1.1', "10.0.0.1"),
    ],
)
async def test_forwarded_is_read_and_written_as_standardized(told: str, client: str) -> None:
    layer = ForwardedLayer(RFC, trusted=TRUSTED)
    request, found = await pass_through(layer, "10.0.0.1", ("Forwarded", told), ("X-Forwarded-For", "127.0.0.1"))
    assert found == client
    assert list(request.headers) == [("Forwarded", f'{told}, for=10.0.0.1;proto=http;host="a.test"')]


async def test_ipv6_peer_is_quoted_in_forwarded() -> None:
    request, _ = await pass_through(ForwardedLayer(RFC), "2001:db8::1")
    assert request.headers.get("forwarded") == 'for="[2001:db8::1]";proto=http;host="a.test"'


async def test_nothing_is_told_if_so_configured() -> None:
    request, _ = await pass_through(ForwardedLayer(None), "192.0.2.1", ("X-Forwarded-For", "1.2.3.4"))
    assert list(request.headers) == []

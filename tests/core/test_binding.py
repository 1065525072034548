"""What a listener is bound to: the words for it, which of several has an address and port, and what is refused."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rama_ebpf.core.address import SocketAddress
from rama_ebpf.core.binding import Binding, BindingSet, conflict, port_tables


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("198.18.0.0/16:1-65535", ["198.18.0.0/16:1-65535"]),
        ("198.18.0.0/16", ["198.18.0.0/16:1-65535"]),
        ("127.0.0.1:1080", ["127.0.0.1:1080"]),
        ("0.0.0.0:80", ["0.0.0.0:80"]),
        ("[2001:db8::]/32:443", ["[2001:db8::]/32:443"]),
        ("[2001:db8::/32]:443", ["[2001:db8::]/32:443"]),
        ("[2001:db8::]/32", ["[2001:db8::]/32:1-65535"]),
        ("[::]/0:1080", ["[::]/0:1080"]),
        ("[::]:1080", ["[::]/0:1080", "0.0.0.0:1080"]),
    ],
)
def test_word_means(text: str, bound: list[str]) -> None:
    assert [str(binding) for binding in BindingSet.of(text).bindings] == bound


@pytest.mark.parametrize(
    "text",
    [
        "",
        "198.18.0.1",
        "198.18.0.1/16:5",
        "198.18.0.0/33:5",
        "198.18.0.0/16:0-5",
        "198.18.0.0/16:9-8",
        "198.18.0.0/16:1-65536",
        "198.18.0.0/16:-5",
        "198.18.0.0/16:5-",
        "::/0:5",
        "[2001:db8::/32]/32:5",
        "[::ffff:198.18.0.0]/112:5",
        "example.com:80",
    ],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        BindingSet.of(text)


@pytest.mark.parametrize(
    ("one", "other", "refused"),
    [
        ("198.18.0.0/16:80", "198.18.0.0/16:80", True),
        ("198.18.0.0/16:1-100", "198.18.0.0/16:50-150", True),
        ("198.18.0.0/16:1-100", "198.18.0.0/16:50-100", False),
        ("198.18.0.0/16:1-100", "198.18.1.0/24:1-100", False),
        ("198.18.0.0/16:1-100", "198.18.0.0/16:101-150", False),
        ("0.0.0.0:1080", "127.0.0.1:1080", False),
    ],
)
def test_only_what_leaves_open_who_has_it_is_a_conflict(one: str, other: str, refused: bool) -> None:
    (first,), (second,) = BindingSet.of(one).bindings, BindingSet.of(other).bindings
    assert conflict(first, second) == conflict(second, first) == refused


def test_dual_stack_wildcard_leaves_ipv4_to_who_has_it_by_name() -> None:
    _, implied = BindingSet.of("[::]:1080").bindings
    (explicit,) = BindingSet.of("0.0.0.0:1080").bindings
    assert not conflict(implied, explicit)
    tables = port_tables([(implied, 1), (explicit, 2)])
    assert [owner for _, owner in tables[explicit.network]] == [2]
    assert port_tables([(implied, 1)], [SocketAddress(ip_address("0.0.0.0"), 1080)])[implied.network] == ()


def _networks(family: str) -> st.SearchStrategy[str]:
    lengths = st.integers(0, 4)
    if family == "4":
        return lengths.map(lambda n: f"{IPv4Address(0xC6120000 >> (32 - 4 * n) << (32 - 4 * n) if n else 0)}/{4 * n}")
    top = 0x20010DB8 << 96
    return lengths.map(lambda n: f"[{IPv6Address(top >> (128 - 8 * n) << (128 - 8 * n) if n else 0)}]/{8 * n}")


_WORDS = st.tuples(
    st.sampled_from("46").flatmap(_networks), st.tuples(st.integers(1, 60), st.integers(1, 60)).map(sorted)
).map(lambda pair: f"{pair[0]}:{pair[1][0]}-{pair[1][1]}")


@settings(max_examples=150, deadline=None)
@given(st.lists(_WORDS, max_size=8))
def test_longest_prefix_says_who_has_the_most_specific_binding(words: list[str]) -> None:
    """What the two look-ups of the kernel find is what a search through all bindings does."""
    bound: list[tuple[Binding, int]] = []
    for word in words:
        (binding,) = BindingSet.of(word).bindings
        if not any(conflict(binding, other) for other, _ in bound):
            bound.append((binding, len(bound)))
    tables = port_tables(bound)
    for ip in (IPv4Address("198.18.3.4"), IPv4Address("198.16.0.1"), IPv6Address("2001:db8::1"), IPv6Address("::9")):
        longest = max(
            (n for n in tables if n.version == ip.version and ip in n), key=lambda n: n.prefixlen, default=None
        )
        for port in range(1, 62):
            holding = [(b.rank, owner) for b, owner in bound if b.holds(ip, port)]
            wanted = min(holding)[1] if holding else None
            table = () if longest is None else tables[longest]
            assert next((o for ports, o in table if ports.first <= port <= ports.last), None) == wanted

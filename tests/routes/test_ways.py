"""Ways as a whole: what cannot work is refused with its name and the remedy; no secret is ever shown."""

from __future__ import annotations

import pytest

from rama_ebpf.core import Authority, Credentials
from rama_ebpf.routes import Chain, Direct, Group, Parent, Route, RouteError, WayBook

PARENT = Parent("socks5", Authority.of("parent.example", 1080))


def group(*members: str, **more) -> Group:
    return Group((members,), **more)


@pytest.mark.parametrize(
    ("ways", "text"),
    [
        ({"direct": PARENT}, "reserved"),
        ({"refuse": PARENT}, "reserved"),
        ({"reset": PARENT}, "reserved"),
        ({"": PARENT}, "use 1-63"),
        ({"a b": PARENT}, "use 1-63"),
        ({"g": group()}, "group g is empty"),
        ({"g": Group(())}, "group g is empty"),
        ({"g": Group((("direct",), ()))}, "group g is empty"),
        ({"g": group("gone")}, "group g names the way 'gone', which is not there; there are direct"),
        ({"p": PARENT, "g": group("p", "p")}, "names p twice"),
        ({"g": group("refuse")}, "member refuse: leave it out"),
        ({"g": group("direct", weights={"x": 2})}, "weights for x"),
        ({"g": group("direct", weights={"direct": 0})}, "1 to 1000"),
        ({"g": group("g")}, "circle: g → g"),
        ({"a": group("b"), "b": group("c"), "c": group("a")}, "circle: a → b → c → a"),
        ({f"g{n}": group(f"g{n + 1}" if n < 4 else "direct") for n in range(5)}, "nested 5 deep"),
        ({"c": Chain(())}, "chain c is empty"),
        ({"c": Chain(("direct",))}, "which is no parent"),
        ({"c": Chain(("gone",))}, "'gone', which is not there"),
        ({"p": PARENT, "c": Chain(("p", "p"))}, "through p twice"),
    ],
)
def test_ways_that_cannot_work_are_refused_with_the_remedy(ways, text):
    with pytest.raises(RouteError, match=text):
        WayBook(ways)


def test_route_to_an_unknown_way_is_refused():
    with pytest.raises(RouteError, match=r"route r names the way 'gone'.*there are direct, refuse, reset") as caught:
        WayBook({}).check_routes([Route("r", "gone")])
    assert caught.value.where == ("route", "r")


def test_group_named_like_a_word_that_means_something_elsewhere_is_a_group_like_any():
    """I3: a group called ``default`` never got its checks."""
    book = WayBook({"default": group("p"), "p": PARENT})
    assert list(book.leaves("default")) == ["p"]


def test_ways_of_nested_groups_are_each_counted_once():
    book = WayBook({"a": PARENT, "b": PARENT, "in": group("a", "b"), "out": group("in", "a", "direct")})
    assert list(book.leaves("out")) == ["a", "b", "direct"]
    assert list(book.leaves("refuse")) == []


def test_no_text_of_a_parent_holds_its_login():
    parent = Parent("http", Authority.of("p.example", 3128), Credentials("tok-user", "s3cret"))
    for text in (str(parent), repr(parent), repr(WayBook({"p": parent})["p"])):
        assert "s3cret" not in text
        assert "tok-user" not in text
    assert str(parent) == "http://***@p.example:3128"


@pytest.mark.parametrize(
    ("scheme", "name", "password", "text"),
    [
        ("http", "a:b", "x", "colon"),
        ("socks5", "", "x", "1-255"),
        ("socks5", "a", "x" * 256, "1-255"),
        ("socks4", "a", "x", "no passwords"),
    ],
)
def test_login_that_its_protocol_cannot_carry_is_refused_without_being_shown(scheme, name, password, text):
    with pytest.raises(RouteError, match=text) as caught:
        Parent(scheme, Authority.of("p.example", 1), Credentials(name, password))
    assert password not in str(caught.value) or len(password) < 2


def test_direct_without_more_is_what_the_host_chooses():
    assert WayBook({})["direct"] == Direct()

"""Options in user names are found, refused when unclear, and left out of what is authenticated."""

from __future__ import annotations

import pytest

from rama_ebpf.core import AuthFailed, Authority, Credentials, Extensions, Target, User, stack
from rama_ebpf.core.matchers import UserOption
from rama_ebpf.layers.auth import StaticUsers
from rama_ebpf.layers.username import DashedUsername, UsernameOptionsLayer

parse = DashedUsername(["country", "session"], flags=["residential"])


@pytest.mark.parametrize(
    ("username", "name", "options"),
    [
        ("tom", "tom", {}),
        ("tom-country-us-session-abc", "tom", {"country": "us", "session": "abc"}),
        ("tom-residential-country-us", "tom", {"residential": "", "country": "us"}),
        ("tom-smith-country-us", "tom-smith", {"country": "us"}),
        ("tom-nonsense", "tom-nonsense", {}),
        ("country-country-us", "country", {"country": "us"}),
        ("", "", {}),
    ],
)
def test_name_and_options_are_told_apart(username, name, options):
    assert parse(username) == (name, options)


@pytest.mark.parametrize(
    "username",
    ["tom-country", "tom-country-", "tom-country-us-country-de", "tom-country-us-city-paris", "tom-country-a b"],
)
def test_option_that_is_not_clear_is_refused(username):
    with pytest.raises(ValueError, match="option"):
        parse(username)


async def test_layer_authenticates_the_bare_name_and_adds_the_options():
    authenticate = stack(UsernameOptionsLayer(parse), StaticUsers({"tom": "secret"}))
    user = await authenticate(Credentials("tom-country-us", "secret"))
    assert user == User("tom", {"country": "us"})
    for username in ("tom-country", "eve-country-us"):
        with pytest.raises(AuthFailed):
            await authenticate(Credentials(username, "secret"))


def test_connectors_can_be_chosen_by_an_option():
    extensions = Extensions()
    extensions.add(User("tom", {"country": "us"}))
    target = Target("example.test", 80, extensions)
    assert UserOption("country", "us", "ca")(target)
    assert UserOption("country")(target)
    assert not UserOption("country", "de")(target)
    assert not UserOption("session")(target)
    assert not UserOption("country")(Target("example.test", 80))
    assert isinstance(target, Authority)

from __future__ import annotations

import pytest

from rama_ebpf.core import Extensions
from rama_ebpf.core.matchers import Matcher
from rama_ebpf.services.http import Request
from rama_ebpf.services.matchers import Host, Method, Path, Sni
from rama_ebpf.services.tls.client_hello import ClientHello


@pytest.mark.parametrize(
    ("matcher", "expected"),
    [
        (Method("GET", "HEAD"), True),
        (Method("get"), False),
        (Host("*.example.com"), True),
        (Host("example.com"), False),
        (Path("/api/*"), True),
        (Path("/api/v1/users"), True),
        (Path("/api"), False),
        (Path("/apis/*"), False),
        (Path("/*"), True),
        (Host(".example.com") & Path("/api/*") & ~Method("POST"), True),
    ],
)
def test_request_matchers(matcher: Matcher, expected: bool) -> None:
    request = Request("GET", "WWW.Example.com:8080", "/api/v1/users?x=/other")
    assert matcher(request) is expected


@pytest.mark.parametrize(("authority", "expected"), [("[2001:db8::1]:80", False), ("", False), ("example.com", True)])
def test_host_is_without_its_port(authority: str, expected: bool) -> None:
    assert Host("example.com")(Request("GET", authority, "/")) is expected


def test_a_directory_pattern_takes_the_directory_itself() -> None:
    assert Path("/api/*")(Request("GET", "a", "/api"))


def test_a_path_without_a_slash_is_refused() -> None:
    with pytest.raises(ValueError, match="begins with"):
        Path("api")


@pytest.mark.parametrize(("name", "expected"), [("www.example.com", True), ("example.org", False), (None, False)])
def test_sni(name: str | None, expected: bool) -> None:
    request = Request("GET", "a", "/", extensions=Extensions())
    assert not Sni("*.example.com")(request)
    request.extensions.add(ClientHello(0x0303, b"", (), b"", (), server_name=name))
    assert Sni("*.example.com")(request) is expected

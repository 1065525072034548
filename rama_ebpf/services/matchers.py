"""Matchers that look into TLS and HTTP; they combine with those of :mod:`rama_ebpf.core.matchers`."""

from __future__ import annotations

import re

from ..core.client import HasExtensions
from ..core.matchers import Matcher
from ..core.names import NameSet
from .http.message.model import Request
from .tls.client_hello import ClientHello

__all__ = ["Host", "Method", "Path", "Sni"]


class Sni(Matcher):
    """The server name of the ClientHello matches one of these patterns; needs a TlsPeekLayer outside."""

    def __init__(self, *patterns: str) -> None:
        self._names = NameSet(patterns)

    def __call__(self, input: HasExtensions, /) -> bool:
        hello = input.extensions.get(ClientHello)
        return hello is not None and hello.server_name in self._names


class Method(Matcher):
    """The request's method is one of these (case counts, RFC 9110 section 9.1)."""

    def __init__(self, *methods: str) -> None:
        self._methods = frozenset(methods)

    def __call__(self, request: Request, /) -> bool:
        return request.method in self._methods


class Host(Matcher):
    """The host that the request names, without its port, matches one of these patterns."""

    def __init__(self, *patterns: str) -> None:
        self._names = NameSet(patterns)

    def __call__(self, request: Request, /) -> bool:
        host = re.sub(r":\d*$", "", request.authority).lower().removesuffix(".")
        return bool(host) and host in self._names


class Path(Matcher):
    """The path, without the query, is one of these; a pattern that ends in ``/*`` takes everything below it too.

    Percent-encoding is not undone: ``/%61`` is not ``/a`` here. What must not be reached by another spelling needs a
    server that normalises first.
    """

    def __init__(self, *patterns: str) -> None:
        for pattern in patterns:
            if not pattern.startswith("/") and pattern != "*":
                raise ValueError(f"a path begins with '/': {pattern!r}")
        self._exact = frozenset(pattern.removesuffix("/*") or "/" for pattern in patterns)
        self._below = tuple(pattern[:-1] for pattern in patterns if pattern.endswith("/*"))

    def __call__(self, request: Request, /) -> bool:
        path = request.path.partition("?")[0]
        return path in self._exact or path.startswith(self._below)

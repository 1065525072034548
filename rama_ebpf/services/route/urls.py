"""Parents by URL, and how such a URL is shown: without what it says of our log-in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ...core.address import Authority
from ...core.auth import Credentials
from ...routes.health import HealthLimits
from ...routes.model import DEFAULT_PORTS, Parent

__all__ = ["hidden_url", "parse_parent"]


def parse_parent(
    url: str,
    *,
    trusted: bool = False,
    resolve_here: bool | None = None,
    ca: Path | None = None,
    limits: HealthLimits | None = None,
) -> Parent:
    """Return the parent that ``url`` names: ``scheme://user:password@host:port`` with percent-encoding in user and
    password; the schemes are :data:`~rama_ebpf.routes.model.DEFAULT_PORTS`.

    Targets' names are looked up by the parent, by ``socks4://`` here, and here if ``resolve_here``. Raises ValueError;
    its text holds no password.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in DEFAULT_PORTS:
            raise ValueError(f"the scheme must be one of {', '.join(DEFAULT_PORTS)}")
        if not parts.hostname:
            raise ValueError("it names no host")
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ValueError("a proxy has no path, query or fragment")
        port = DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
        if port == 0:
            raise ValueError("port 0 is none")
        address = Authority.of(parts.hostname, port)
    except ValueError as error:
        text = str(error)
        if parts_of := re.search(r"'[^']*'", text):  # urlsplit repeats what it does not like
            text = text.replace(parts_of.group(), "it")
        raise ValueError(f"proxy URL: {text}") from None
    login = None
    if parts.username is not None:
        login = Credentials(unquote(parts.username), unquote(parts.password or ""))
    made = Parent(parts.scheme, address, login, trusted, parts.scheme == "socks4", ca, limits or HealthLimits())
    return made if resolve_here is None else replace(made, resolve_here=resolve_here or made.resolve_here)


def hidden_url(url: str) -> str:
    """Return ``url`` as it may be shown."""
    scheme, colon, rest = url.partition("://")
    if not colon or "@" not in rest:
        return url
    return f"{scheme}://***@{rest.rpartition('@')[2]}"

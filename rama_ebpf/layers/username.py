"""Options in user names: ``tom-country-us-session-abc`` is the user tom who wants a way out in the US.

Proxy clients can rarely send more than a user name and a password, so services with several ways out let their users
put wishes into the name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from ..core.auth import Authenticator, Credentials, User
from ..core.errors import AuthFailed
from ..core.service import check_fit

__all__ = ["DashedUsername", "UsernameOptionsLayer", "UsernameParser"]

UsernameParser = Callable[[str], tuple[str, Mapping[str, str]]]
"""Splits what a client sent as its user name into the name and the options. Raises ValueError if it cannot."""

_VALUE: Final = re.compile(r"[A-Za-z0-9_.:+=]{1,64}")


class DashedUsername:
    """Parses ``name-key-value-key-value-flag``.

    The name ends before the first part that is one of ``keys`` or ``flags``, so it may contain the separator itself.
    From there on every part counts: a key that is unknown, without a value or there twice raises ValueError, because
    a wish that is silently dropped sends traffic where its user does not want it. A flag's value is "".
    """

    def __init__(self, keys: Iterable[str], *, flags: Iterable[str] = (), separator: str = "-") -> None:
        self._keys = frozenset(keys)
        self._flags = frozenset(flags)
        self._separator = separator
        for word in self._keys | self._flags:
            if not word or separator in word:
                raise ValueError(f"an option's key must be a word without {separator!r}, not {word!r}")
        if self._keys & self._flags:
            raise ValueError(f"both key and flag: {sorted(self._keys & self._flags)}")

    def __call__(self, username: str) -> tuple[str, Mapping[str, str]]:
        parts = username.split(self._separator)
        known = self._keys | self._flags
        end = next((at for at, part in enumerate(parts) if at and part in known), len(parts))
        options: dict[str, str] = {}
        rest = iter(parts[end:])
        for key in rest:
            if key not in known:
                raise ValueError(f"option {key!r} is unknown")
            if key in options:
                raise ValueError(f"option {key!r} is there twice")
            value = next(rest, "") if key in self._keys else ""
            if key in self._keys and not _VALUE.fullmatch(value):
                raise ValueError(f"option {key!r} has no usable value")
            options[key] = value
        return self._separator.join(parts[:end]), options


class UsernameOptionsLayer:
    """Around an authenticator: takes the options out of the user name first and adds them to the user found.

    What ``parse`` refuses is refused as a failed authentication.
    """

    def __init__(self, parse: UsernameParser) -> None:
        self._parse = parse

    def __call__(self, inner: Authenticator, /) -> Authenticator:
        check_fit(self, Credentials, inner)

        async def authenticate(credentials: Credentials, /) -> User:
            try:
                name, options = self._parse(credentials.username)
            except ValueError as error:
                raise AuthFailed(f"user name {credentials.username!r}: {error}", kind="auth_absent") from error
            user = await inner(Credentials(name, credentials.password))
            return User(user.name, {**user.options, **options})

        return authenticate

"""Users whose password hashes are looked up by user code: in a database, a directory, a service of yours."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..core.auth import Credentials, User
from ..core.errors import AuthFailed
from ..core.proven import LocalProven, Proven
from .check_queue import CheckQueue
from .hashes import choose_cost, parse_hash
from .source import source_prefix

__all__ = ["PasswordTable"]


class PasswordTable:
    """An authenticator over ``find``, which returns a user's hash (scrypt, bcrypt or argon2, as
    :func:`~.auth.hash_password` makes them) and the :class:`User`, or None for an unknown name.

    ``find`` is called on the event loop for each log-in, so it must be quick: a local database. Hashes are checked
    beside the loop, fairly by source, by ``queue``; a correct password is remembered by ``proven`` for ``cache``
    seconds, for as long as the hash stays the same. Raises :class:`AuthFailed`, or
    :class:`~rama_ebpf.core.errors.Busy`.
    """

    accepts = Credentials

    def __init__(
        self,
        find: Callable[[Credentials], tuple[str, User] | None],
        *,
        queue: CheckQueue | None = None,
        proven: Proven | None = None,
        cache: float = 300.0,
    ) -> None:
        self._find = find
        self._queue = CheckQueue() if queue is None else queue
        self._proven: Proven = LocalProven() if proven is None else proven
        self._cache_seconds = cache
        log_n, p = choose_cost()
        self._nobody = f"$scrypt$ln={log_n},r=8,p={p}${'A' * 22}${'A' * 43}"

    async def __call__(self, credentials: Credentials, /) -> User:
        name, password = credentials.username, credentials.password
        found = self._find(credentials)
        # An unknown name costs a check as well, so that time does not tell which names exist.
        text = self._nobody if found is None else found[0]
        token = self._proven.token(name, password, text)
        if found is not None and self._proven.holds(token):
            return found[1]
        source = None if credentials.source is None else source_prefix(credentials.source)
        correct = await self._queue.run(source, functools.partial(parse_hash(text).check, password.encode()))
        if found is None or not correct:
            self._queue.failed(source)
            raise AuthFailed(f"unknown user or wrong password: {name!r}")
        self._proven.add(token, self._cache_seconds)
        return found[1]

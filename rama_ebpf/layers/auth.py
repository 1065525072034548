"""Authenticators: services from :class:`~rama_ebpf.core.auth.Credentials` to :class:`~rama_ebpf.core.auth.User`.

Protocol servers take one as ``auth``. A callable of your own is one too; these are the two that most need.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..core.auth import Authenticator, Credentials, User
from ..core.client import Carrier
from ..core.errors import AuthFailed, RamaError
from ..core.proven import LocalProven, Proven
from ..core.service import Output, Service, check_fit
from ..core.text_file import read_text_file
from .check_queue import CheckQueue
from .hashes import DEAR_SECONDS, PasswordHash, choose_cost, hash_password, parse_hash
from .source import source_prefix

__all__ = ["AuthLayer", "PasswordFile", "PasswordFileError", "StaticUsers", "hash_password"]

log = logging.getLogger(__name__)

_MAX_FILE: Final = 64 * 1024 * 1024
_WRITING_NS: Final = 2_000_000_000
"""For how long a file may be empty before that says that there are no users."""


class PasswordFileError(RamaError, ValueError):
    """A password file cannot be used; the text names file, line and remedy."""

    kind = "password_file"


class _Unseen(PasswordFileError):
    """Not even a look at the file is allowed: it need not have changed."""


class AuthLayer:
    """Authenticates inputs whose extensions hold :class:`Credentials`, and adds the :class:`User`.

    For protocols of your own: SOCKS5 and HTTP take the authenticator themselves, to send their own refusals. An
    input without credentials is refused. Raises :class:`AuthFailed`.
    """

    def __init__(self, authenticate: Authenticator) -> None:
        check_fit(self, Credentials, authenticate)
        self._authenticate = authenticate

    def __call__(self, inner: Service[Carrier, Output], /) -> Service[Carrier, Output]:
        async def serve(input: Carrier, /) -> Output:
            credentials = input.extensions.get(Credentials)
            if credentials is None:
                raise AuthFailed("no credentials", kind="auth_absent")
            input.extensions.add(await self._authenticate(credentials))
            return await inner(input)

        return serve


def _refused(username: str) -> AuthFailed:
    return AuthFailed(f"unknown user or wrong password: {username!r}")


class StaticUsers:
    """Users and their passwords in the clear, for tests and small set-ups: ``StaticUsers({"tom": "secret"})``."""

    accepts = Credentials

    def __init__(self, passwords: Mapping[str, str]) -> None:
        self._passwords = {name: password.encode() for name, password in passwords.items()}

    def known(self, credentials: Credentials, /) -> User | None:
        """See :func:`~rama_ebpf.core.auth.known_at_once`."""
        expected = self._passwords.get(credentials.username)
        equal = hmac.compare_digest(expected or secrets.token_bytes(16), credentials.password.encode())
        return User(credentials.username) if equal and expected is not None else None

    async def __call__(self, credentials: Credentials, /) -> User:
        # The comparison takes place for an unknown user too, so that time does not tell which names exist.
        expected = self._passwords.get(credentials.username)
        equal = hmac.compare_digest(expected or secrets.token_bytes(16), credentials.password.encode())
        if expected is None or not equal:
            raise _refused(credentials.username)
        return User(credentials.username)


class PasswordFile:
    """Users from a file of ``name:hash`` lines with scrypt, bcrypt or argon2 hashes; ``#`` begins a comment.

    The file is read again when it has changed; if it then cannot be used, an error line says so once and the last good
    one stays in force. Hashes are checked by ``queue`` (by default one of its own, with one thread), fairly by the
    source in :class:`Credentials`; equal credentials of one source that come at the same time are checked once. A
    correct password is remembered by ``proven`` for ``cache`` seconds, under a keyed hash and until the user's line
    changes.

    Raises :class:`PasswordFileError` if the first read fails; a call raises :class:`AuthFailed`, or
    :class:`~rama_ebpf.core.errors.Busy` if we have no time to check.
    """

    accepts = Credentials

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        queue: CheckQueue | None = None,
        proven: Proven | None = None,
        cache: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = Path(path)
        self._queue = CheckQueue() if queue is None else queue
        self._proven: Proven = LocalProven(clock=clock) if proven is None else proven
        self._cache_seconds = cache
        self._flights: dict[tuple[Hashable, bytes], _Flight] = {}
        self._complaint = ""
        self._stamp = self._stat()
        self._users = self._read()

    def known(self, credentials: Credentials, /) -> User | None:
        """See :func:`~rama_ebpf.core.auth.known_at_once`: whose password has been proven lately."""
        self._reload_if_changed()
        name = credentials.username
        if name not in self._users or not self._proven.holds(self._token(name, credentials.password)):
            return None
        return User(name)

    async def __call__(self, credentials: Credentials, /) -> User:
        self._reload_if_changed()
        name, password = credentials.username, credentials.password
        token = self._token(name, password)
        if name not in self._users or not self._proven.holds(token):
            source = None if credentials.source is None else source_prefix(credentials.source)
            await self._check_once(source, token, name, password)
        return User(name)

    @property
    def names(self) -> frozenset[str]:
        """The users of the file, as it was read last."""
        return frozenset(self._users)

    def dear(self) -> list[tuple[str, float]]:
        """Users whose hash costs more than :data:`~.hashes.DEAR_SECONDS` on this machine, with the seconds."""
        costs = ((name, user.seconds()) for name, user in self._users.items())
        return [(name, seconds) for name, seconds in costs if seconds > DEAR_SECONDS]

    def warn_of_dear_hashes(self) -> None:
        """Log a warning for each user of :meth:`dear`."""
        for name, seconds in self.dear():
            log.warning(
                "%s: a check of %s's password costs %.0f ms: a new hash (rama-ebpf passwd) keeps logins quick",
                *(self._path, name, seconds * 1000),
            )

    def _token(self, name: str, password: str) -> bytes:
        user = self._users.get(name)
        return self._proven.token(name, password, "" if user is None else user.text)

    async def _check_once(self, source: Hashable, token: bytes, name: str, password: str) -> None:
        """Check, or join the check of the same credentials that is under way."""
        key = source, token
        flight = self._flights.get(key)
        follows = flight is not None
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(self._check(source, name, password)))
            flight.task.add_done_callback(lambda _task: self._flights.pop(key, None))
        flight.waiting += 1
        try:
            await asyncio.shield(flight.task)
        except AuthFailed as error:
            # A browser sends a stale password with each of a page's requests: that is one guess.
            raise AuthFailed(str(error), kind="auth_repeated" if follows else None) from None
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()  # nobody waits for it any more
                self._flights.pop(key, None)

    async def _check(self, source: Hashable, name: str, password: str) -> None:
        while True:
            user = self._users.get(name)
            # An unknown name costs a check as well, so that time does not tell which names exist.
            check = (user or next(iter(self._users.values()), _nobody())).check
            correct = await self._queue.run(source, functools.partial(check, password.encode()))
            self._reload_if_changed()
            now = self._users.get(name)
            if (None if now is None else now.text) == (None if user is None else user.text):
                break  # else the file was replaced meanwhile, and this line with it: the new one decides
        if user is None or not correct:
            self._queue.failed(source)
            raise _refused(name)
        self._proven.add(self._token(name, password), self._cache_seconds)

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except PermissionError as error:
            raise _Unseen(f"{self._path}: {error.strerror}") from error
        except OSError as error:
            raise PasswordFileError(f"{self._path}: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise PasswordFileError(f"{self._path}: not a regular file")  # a FIFO would never end
        if found.st_size > _MAX_FILE:
            raise PasswordFileError(f"{self._path}: larger than {_MAX_FILE >> 20} MiB")
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _reload_if_changed(self) -> None:
        try:
            stamp = self._stat()
            if stamp == self._stamp or _is_just_written(stamp):
                return
            self._stamp = stamp
            self._users = self._read()
        except PasswordFileError as error:
            if str(error) == self._complaint:
                return  # once, not for every client
            self._complaint = str(error)
            if isinstance(error, _Unseen):
                log.info("%s is not watched, for workers cannot enter its directory: SIGHUP has it read", self._path)
            else:
                log.error("password file not reloaded, the last good one stays: %s", error)
        else:
            self._complaint = ""
            log.info("password file %s reloaded: %d users", self._path, len(self._users))

    def _read(self) -> dict[str, PasswordHash]:
        try:
            text = read_text_file(self._path, _MAX_FILE)
        except PermissionError as error:
            remedy = "SIGHUP has it read by root; or chmod 0640 with the workers' group"
            raise PasswordFileError(f"{self._path}: {error.strerror} ({remedy})") from error
        except (OSError, UnicodeDecodeError) as error:
            raise PasswordFileError(f"{self._path}: {error}") from error
        users: dict[str, PasswordHash] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, colon, digest = line.partition(":")
            try:
                if not colon or not name:
                    raise ValueError("write name:hash")
                if name in users:
                    raise ValueError(f"user {name!r} is there twice")
                users[name] = parse_hash(digest.strip())
            except (ValueError, KeyError) as error:
                raise PasswordFileError(f"{self._path}:{number}: {error}") from error
        return users


def _is_just_written(stamp: tuple[int, int, int]) -> bool:
    """Whether a file is empty because somebody has just begun to write it: nobody is to be refused for that."""
    _, changed, size = stamp
    return not size and 0 <= time.time_ns() - changed < _WRITING_NS


@dataclass(slots=True)
class _Flight:
    """A check under way, and how many clients wait for it."""

    task: asyncio.Task[None]
    waiting: int = 0


@functools.cache
def _nobody() -> PasswordHash:
    """A hash of the usual cost that no password has: checked for any name where the file has no user at all."""
    log_n, p = choose_cost()
    return parse_hash(f"$scrypt$ln={log_n},r=8,p={p}${'A' * 22}${'A' * 43}")

"""Authenticators: services from :class:`~rama_ebpf.core.auth.Credentials` to :class:`~rama_ebpf.core.auth.User`.

Protocol servers take one as ``auth``. A callable of your own is one too; these are the two that most need.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import time
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from ..core.auth import Authenticator, Credentials, User
from ..core.client import HasExtensions
from ..core.errors import AuthFailed, RamaError
from ..core.service import Service

__all__ = ["AuthLayer", "PasswordFile", "PasswordFileError", "StaticUsers", "hash_password"]

log = logging.getLogger(__name__)

_LOG_N: Final = 15  # 32 MiB and about 0.1 s a hash: OWASP's interactive minimum is 2^15 with p = 3, or 2^17 with p = 1
_R: Final = 8
_P: Final = 3
_MAX_MEMORY: Final = 256 * 1024 * 1024
_NOBODY: Final = f"$scrypt$ln={_LOG_N},r={_R},p={_P}$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
"""A hash of the usual cost that no password has: checked for names that do not exist."""


class PasswordFileError(RamaError, ValueError):
    """A password file cannot be used; the text names file, line and remedy."""

    kind = "password_file"


class AuthLayer:
    """Authenticates inputs whose extensions hold :class:`Credentials`, and adds the :class:`User`.

    For protocols of your own: SOCKS5 and HTTP take the authenticator themselves, to send their own refusals. An
    input without credentials is refused. Raises :class:`AuthFailed`.
    """

    def __init__(self, authenticate: Authenticator) -> None:
        self._authenticate = authenticate

    def __call__(self, inner: Service[Any, Any]) -> Service[Any, Any]:
        async def serve(input: HasExtensions) -> Any:
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

    async def __call__(self, credentials: Credentials, /) -> User:
        # The comparison takes place for an unknown user too, so that time does not tell which names exist.
        expected = self._passwords.get(credentials.username)
        equal = hmac.compare_digest(expected or secrets.token_bytes(16), credentials.password.encode())
        if expected is None or not equal:
            raise _refused(credentials.username)
        return User(credentials.username)


def hash_password(password: str) -> str:
    """Return ``$scrypt$ln=…,r=…,p=…$salt$hash`` (RFC 7914; base64 without padding) with a fresh salt."""
    salt = secrets.token_bytes(16)
    digest = _scrypt(password.encode(), salt, _LOG_N, _R, _P, 32)
    return f"$scrypt$ln={_LOG_N},r={_R},p={_P}${_encode(salt)}${_encode(digest)}"


def _scrypt(password: bytes, salt: bytes, log_n: int, r: int, p: int, length: int) -> bytes:
    return hashlib.scrypt(password, salt=salt, n=1 << log_n, r=r, p=p, maxmem=_MAX_MEMORY, dklen=length)


def _encode(data: bytes) -> str:
    return b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return b64decode(text + "=" * (-len(text) % 4), validate=True)


_Check = Callable[[bytes], bool]


def _scrypt_check(fields: list[str]) -> _Check:
    _, _, parameters, salt_text, digest_text = fields
    numbers = dict(part.split("=", 1) for part in parameters.split(","))
    log_n, r, p = (int(numbers[name]) for name in ("ln", "r", "p"))
    salt, expected = _decode(salt_text), _decode(digest_text)
    if not (1 <= log_n <= 20 and 1 <= r <= 32 and 1 <= p <= 16 and len(expected) >= 16):
        raise ValueError("scrypt parameters are out of range (ln 1-20, r 1-32, p 1-16, hash of at least 16 bytes)")
    if 128 * r * (1 << log_n) > _MAX_MEMORY // 2:
        raise ValueError("scrypt parameters need more than 128 MiB")

    def check(password: bytes) -> bool:
        return hmac.compare_digest(_scrypt(password, salt, log_n, r, p, len(expected)), expected)

    return check


def _bcrypt_check(text: str) -> _Check:
    try:
        import bcrypt
    except ImportError:
        raise ValueError("bcrypt hashes need the package bcrypt: pip install rama-ebpf[bcrypt]") from None
    digest = text.encode()
    bcrypt.checkpw(b"", digest)  # raises ValueError for a malformed hash now, not when a client comes

    def check(password: bytes) -> bool:
        return bcrypt.checkpw(password[:72], digest)  # 72 bytes is where every bcrypt has always cut

    return check


def _parse_hash(text: str) -> _Check:
    fields = text.split("$")
    if text.startswith("$scrypt$") and len(fields) == 5:
        return _scrypt_check(fields)
    if text.startswith(("$2a$", "$2b$", "$2y$")):
        return _bcrypt_check(text)
    raise ValueError("the hash must be $scrypt$… (rama-ebpf passwd) or $2b$… (htpasswd -B)")


class PasswordFile:
    """Users from a file of ``name:hash`` lines with scrypt or bcrypt hashes; ``#`` begins a comment.

    The file is read again when it has changed; if it then cannot be used, an error line says so and the last good
    one stays in force. Hashes are checked in ``threads`` threads of their own, at most ``max_waiting`` wait for one,
    and a correct password is remembered (as a keyed hash) for ``cache`` seconds, because one check costs about as
    much as a thousand connections. Raises :class:`PasswordFileError` if the first read fails.
    """

    accepts = Credentials

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 2,
        max_waiting: int = 256,
        cache: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = Path(path)
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="auth")
        self._waiting = 0
        self._max_waiting = max_waiting
        self._cache_seconds = cache
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._good: OrderedDict[bytes, float] = OrderedDict()
        self._nobody = _parse_hash(_NOBODY)
        self._complaint = ""
        self._stamp = self._stat()
        self._users = self._read()

    async def __call__(self, credentials: Credentials, /) -> User:
        self._reload_if_changed()
        token = hmac.digest(
            self._key, f"{len(credentials.username)}:{credentials.username}{credentials.password}".encode(), "sha256"
        )
        now = self._clock()
        if self._good.get(token, 0.0) <= now:
            await self._check(credentials)
            self._remember(token, now)
        return User(credentials.username)

    async def _check(self, credentials: Credentials) -> None:
        if self._waiting >= self._max_waiting:
            raise AuthFailed(f"{self._waiting} passwords are being checked: no room for {credentials.username!r}")
        # An unknown name costs a check as well, so that time does not tell which names exist.
        check = self._users.get(credentials.username)
        self._waiting += 1
        try:
            correct = await asyncio.get_running_loop().run_in_executor(
                self._pool, check or self._nobody, credentials.password.encode()
            )
        finally:
            self._waiting -= 1
        if check is None or not correct:
            raise _refused(credentials.username)

    def _remember(self, token: bytes, now: float) -> None:
        self._good[token] = now + self._cache_seconds
        self._good.move_to_end(token)
        if len(self._good) > 4096:
            self._good.popitem(last=False)

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise PasswordFileError(f"{self._path}: {error.strerror}") from error
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _reload_if_changed(self) -> None:
        try:
            stamp = self._stat()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._users = self._read()
        except PasswordFileError as error:
            if str(error) != self._complaint:  # once, not for every client
                self._complaint = str(error)
                log.error("password file not reloaded, the last good one stays: %s", error)
        else:
            self._complaint = ""
            self._good.clear()
            log.info("password file %s reloaded: %d users", self._path, len(self._users))

    def _read(self) -> dict[str, _Check]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PasswordFileError(f"{self._path}: {error}") from error
        users: dict[str, _Check] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, colon, digest = line.partition(":")
            try:
                if not colon or not name:
                    raise ValueError("write name:hash")
                if name in users:
                    raise ValueError(f"user {name!r} is there twice")
                users[name] = _parse_hash(digest.strip())
            except (ValueError, KeyError) as error:
                raise PasswordFileError(f"{self._path}:{number}: {error}") from error
        return users

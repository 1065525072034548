"""Password hashes: scrypt, bcrypt and argon2, what one check costs, and making new ones.

A check that is too dear starves a proxy: it costs as much as a thousand connections. So the cost of a new hash is
chosen from a measurement on this machine, and hashes that cost more than :data:`DEAR_SECONDS` are pointed out.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
import secrets
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["DEAR_SECONDS", "PasswordHash", "choose_cost", "hash_password", "parse_hash"]

DEAR_SECONDS: Final = 0.1
"""A check that takes longer than this is worth a warning."""
_MAX_MEMORY: Final = 128 * 1024 * 1024
"""Of one check, in bytes."""
_R: Final = 8
_COSTS: Final = ((17, 1), (15, 3), (15, 2), (15, 1), (14, 1), (13, 1))
"""ln and p for scrypt, the dearest first; the last is what is still used on a machine for which all are too dear."""
_BCRYPT: Final = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")
_ARGON2: Final = re.compile(
    r"\$argon2(id|i|d)\$v=19\$m=(\d{1,9}),t=(\d{1,4}),p=(\d{1,3})\$[A-Za-z0-9+/]{11,86}\$([A-Za-z0-9+/]{22,171})"
)


@dataclass(frozen=True, slots=True)
class PasswordHash:
    """One user's hash. ``check`` blocks for ``seconds()`` of a CPU; ``text`` is the hash as it is written down."""

    text: str = field(repr=False)
    check: Callable[[bytes], bool] = field(repr=False)
    seconds: Callable[[], float] = field(repr=False)
    """Estimate what a check costs on this machine, from a measurement of some milliseconds that is made once."""


def hash_password(password: str, cost: tuple[int, int] | None = None) -> str:
    """Return ``$scrypt$ln=…,r=…,p=…$salt$hash`` (RFC 7914; base64 without padding) with a fresh salt.

    ``cost`` is (ln, p); by default :func:`choose_cost` measures it on this machine.
    """
    log_n, p = choose_cost() if cost is None else cost
    salt = secrets.token_bytes(16)
    digest = _scrypt(password.encode(), salt, log_n, _R, p, 32)
    return f"$scrypt$ln={log_n},r={_R},p={p}${_encode(salt)}${_encode(digest)}"


def choose_cost(measure: Callable[[int, int], float] | None = None) -> tuple[int, int]:
    """Return the dearest (ln, p) for scrypt whose check takes at most :data:`DEAR_SECONDS` by ``measure``."""
    seconds = _scrypt_seconds if measure is None else measure
    return next((cost for cost in _COSTS if seconds(*cost) <= DEAR_SECONDS), _COSTS[-1])


def parse_hash(text: str) -> PasswordHash:
    """Read a hash. Raises ValueError (KeyError for a missing parameter) for what is none, or is out of range."""
    fields = text.split("$")
    if text.startswith("$scrypt$") and len(fields) == 5:
        return _parse_scrypt(text, fields)
    if text.startswith(("$2a$", "$2b$", "$2y$")):
        return _parse_bcrypt(text)
    if text.startswith("$argon2"):
        return _parse_argon2(text)
    raise ValueError("the hash must be $scrypt$… (rama-ebpf passwd), $2b$… (htpasswd -B) or $argon2id$…")


def _scrypt(password: bytes, salt: bytes, log_n: int, r: int, p: int, length: int) -> bytes:
    return hashlib.scrypt(password, salt=salt, n=1 << log_n, r=r, p=p, maxmem=2 * _MAX_MEMORY, dklen=length)


def _encode(data: bytes) -> str:
    return b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return b64decode(text + "=" * (-len(text) % 4), validate=True)


def _parse_scrypt(text: str, fields: list[str]) -> PasswordHash:
    _, _, parameters, salt_text, digest_text = fields
    numbers = dict(part.split("=", 1) for part in parameters.split(","))
    log_n, r, p = (int(numbers[name]) for name in ("ln", "r", "p"))
    salt, expected = _decode(salt_text), _decode(digest_text)
    if not (1 <= log_n <= 20 and 1 <= r <= 32 and 1 <= p <= 16 and len(expected) >= 16):
        raise ValueError("scrypt parameters are out of range (ln 1-20, r 1-32, p 1-16, hash of at least 16 bytes)")
    if 128 * r * (1 << log_n) > _MAX_MEMORY:
        raise ValueError("scrypt parameters need more than 128 MiB")

    def check(password: bytes) -> bool:
        return hmac.compare_digest(_scrypt(password, salt, log_n, r, p, len(expected)), expected)

    return PasswordHash(text, check, lambda: _scrypt_seconds(log_n, p * r / _R))


def _parse_bcrypt(text: str) -> PasswordHash:
    try:
        import bcrypt
    except ImportError:
        raise ValueError("bcrypt hashes need the package bcrypt: pip install rama-ebpf[bcrypt]") from None
    found = _BCRYPT.fullmatch(text)
    if found is None or not 4 <= int(found[1]) <= 16:
        raise ValueError("a bcrypt hash has 60 characters and a cost of 4 to 16")
    digest, cost = text.encode(), int(found[1])

    def check(password: bytes) -> bool:
        return bcrypt.checkpw(password[:72], digest)  # 72 bytes is where every bcrypt has always cut

    return PasswordHash(text, check, lambda: _bcrypt_unit() * 2 ** (cost - 4))


def _parse_argon2(text: str) -> PasswordHash:
    try:
        from argon2 import low_level
        from argon2.exceptions import VerifyMismatchError
    except ImportError:
        raise ValueError("argon2 hashes need the package argon2-cffi: pip install rama-ebpf[argon2]") from None
    found = _ARGON2.fullmatch(text)
    if found is None:
        raise ValueError("an argon2 hash is $argon2id$v=19$m=…,t=…,p=…$salt$hash")
    kinds = {"id": low_level.Type.ID, "i": low_level.Type.I, "d": low_level.Type.D}
    kind, memory, passes, lanes = kinds[found[1]], *(int(found[number]) for number in (2, 3, 4))
    if not (8 * lanes <= memory <= _MAX_MEMORY // 1024 and 1 <= passes <= 64 and 1 <= lanes <= 16):
        raise ValueError("argon2 parameters are out of range (m 8p-131072 KiB, t 1-64, p 1-16)")
    digest = text.encode()

    def check(password: bytes) -> bool:
        try:
            return low_level.verify_secret(digest, password, kind)
        except VerifyMismatchError:
            return False

    return PasswordHash(text, check, lambda: _argon2_unit() * memory * passes / 4096)


def _fastest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        started = time.thread_time()
        call()
        times.append(time.thread_time() - started)
    return min(times)


@functools.cache
def _scrypt_unit() -> float:
    return _fastest(lambda: _scrypt(b"", bytes(16), 12, _R, 1, 32))


def _scrypt_seconds(log_n: int, p: float) -> float:
    return _scrypt_unit() * 2.0 ** (log_n - 12) * p


@functools.cache
def _bcrypt_unit() -> float:
    import bcrypt

    salt = bcrypt.gensalt(4)
    return _fastest(lambda: bcrypt.hashpw(b"", salt))


@functools.cache
def _argon2_unit() -> float:
    from argon2 import low_level

    return _fastest(lambda: low_level.hash_secret_raw(b"", bytes(16), 1, 4096, 1, 32, low_level.Type.ID))

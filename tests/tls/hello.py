"""Builds ClientHello messages (RFC 8446 section 4.1.2) and the records that carry them."""

from __future__ import annotations

from collections.abc import Sequence

from .vectors import Vector

__all__ = ["build", "extension", "handshake", "of_vector", "records", "server_name", "vec"]


def vec(width: int, data: bytes) -> bytes:
    """A vector of RFC 8446 section 3.4: length, then data."""
    return len(data).to_bytes(width, "big") + data


def words(numbers: Sequence[int]) -> bytes:
    return b"".join(number.to_bytes(2, "big") for number in numbers)


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vec(2, data)


def server_name(name: bytes) -> bytes:
    return extension(0, vec(2, b"\0" + vec(2, name)))


def handshake(body: bytes, kind: int = 1) -> bytes:
    return bytes((kind,)) + vec(3, body)


def records(message: bytes, size: int = 1 << 14, version: bytes = b"\x03\x01") -> bytes:
    """Split a handshake message into records of at most ``size`` bytes each."""
    parts = (message[i : i + size] for i in range(0, len(message), size))
    return b"".join(b"\x16" + version + vec(2, part) for part in parts)


def build(
    extensions: bytes | None,
    *,
    legacy_version: int = 0x0303,
    cipher_suites: Sequence[int] = (0x1301, 0x1302),
    session_id: bytes = b"",
) -> bytes:
    """Return the body of a ClientHello; ``extensions`` are joined extensions, None leaves the block out."""
    block = b"" if extensions is None else vec(2, extensions)
    return (
        legacy_version.to_bytes(2, "big")
        + bytes(range(32))
        + vec(1, session_id)
        + vec(2, words(cipher_suites))
        + vec(1, b"\0")
        + block
    )


def _numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def of_vector(vector: Vector) -> bytes:
    """Return the handshake message whose fields ``vector`` lists."""
    contents = {
        10: vec(2, words(_numbers(vector.groups))),
        11: vec(1, vector.point_formats),
        13: vec(2, words(_numbers(vector.signature_algorithms))),
        16: vec(2, b"".join(vec(1, name) for name in vector.alpn)),
        43: vec(1, words(_numbers(vector.versions))),
        51: vec(2, words([0x001D]) + vec(2, bytes(32))),
    }
    if vector.server_name is not None:
        contents[0] = vec(2, b"\0" + vec(2, vector.server_name.encode()))
    block = b"".join(extension(kind, contents.get(kind, b"")) for kind in _numbers(vector.extensions))
    return handshake(build(block, legacy_version=vector.legacy_version, cipher_suites=_numbers(vector.cipher_suites)))

"""Data that may be packed with gzip (RFC 1952), which is recognised by its first bytes."""

from __future__ import annotations

import gzip
import io
import zlib

__all__ = ["unpack"]


def unpack(data: bytes, max_size: int) -> bytes:
    """Return the data, unpacked if it is packed. Raises ValueError if it is not whole, or longer than ``max_size``
    bytes; no more than that is ever unpacked."""
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                data = packed.read(max_size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"not whole gzip data: {error}") from error
    if len(data) > max_size:
        raise ValueError(f"longer than {max_size} bytes")
    return data

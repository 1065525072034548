"""Data that may be packed: gzip (RFC 1952), xz (its file format 1.2), or zstd (RFC 8878), told by its first bytes."""

from __future__ import annotations

import gzip
import importlib
import io
import lzma
import zlib
from typing import Any, Final

__all__ = ["unpack"]

_XZ_MEMORY: Final = 128 * 1024 * 1024
"""What a decoder of xz may take: `xz -9` wants 65 MiB."""
_ZSTD_WINDOW: Final = 27
"""The largest window, 128 MiB, which `zstd --ultra` has."""


def _zstd() -> Any:
    for name in ("compression.zstd", "backports.zstd"):  # the first is Python 3.14's
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return None


ZSTD: Final = _zstd()
"""Imported beforehand: whoever parses strangers' bytes opens no files."""


def unpack(data: bytes, max_size: int) -> bytes:
    """Return the data, unpacked if it is packed. Raises ValueError if it is not whole, or longer than ``max_size``
    bytes; no more than that is ever unpacked."""
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                data = packed.read(max_size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"not whole gzip data: {error}") from error
    elif data[:6] == b"\xfd7zXZ\x00":
        data = _unpack_xz(data, max_size)
    elif data[:4] == b"\x28\xb5\x2f\xfd":
        data = _unpack_zstd(data, max_size)
    if len(data) > max_size:
        raise ValueError(f"longer than {max_size} bytes")
    return data


def _unpack_xz(data: bytes, max_size: int) -> bytes:
    found = bytearray()
    try:
        while data and len(found) <= max_size:
            decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
            found += decoder.decompress(data, max_size + 1 - len(found))
            if len(found) > max_size:
                break
            if not decoder.eof:
                raise ValueError("not whole xz data: it ends too soon")
            data = decoder.unused_data
    except lzma.LZMAError as error:
        raise ValueError(f"not whole xz data: {error}") from error
    return bytes(found)


def _unpack_zstd(data: bytes, max_size: int) -> bytes:
    if ZSTD is None:
        raise ValueError("packed with zstd, which takes the package backports.zstd (pip install 'rama-ebpf[codings]')")
    found = bytearray()
    try:
        while data and len(found) <= max_size:
            decoder = ZSTD.ZstdDecompressor(options={ZSTD.DecompressionParameter.window_log_max: _ZSTD_WINDOW})
            found += decoder.decompress(data, max_size + 1 - len(found))
            if len(found) > max_size:
                break
            if not decoder.eof:
                raise ValueError("not whole zstd data: it ends too soon")
            data = decoder.unused_data
    except ZSTD.ZstdError as error:
        raise ValueError(f"not whole zstd data: {error}") from error
    return bytes(found)

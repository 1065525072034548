"""Content codings (RFC 9110 section 8.4.1): decoders that never give more than they are asked for.

gzip and deflate are the standard library's; br needs the package ``brotli`` (the extra ``codings``), zstd
``backports.zstd``. What 1 KiB of a coding stands for can be gigabytes: so each decoder is asked for a number of bytes,
and holds no more than that, its window, and what it was fed.
"""

from __future__ import annotations

import abc
import importlib
import zlib
from collections.abc import Callable
from typing import Any, Final

__all__ = ["BadCoding", "Decoder", "codings", "decoder"]

_WINDOW_LOG: Final = 23
"""8 MiB: what every decoder of zstd must have, and no encoder may want more (RFC 9659)."""


class BadCoding(ValueError):
    """What was fed is not of the coding, or ends before its end."""


class Decoder(abc.ABC):
    """Decodes one body: :meth:`feed` bytes, then :meth:`take` until it returns b""."""

    @abc.abstractmethod
    def feed(self, data: bytes) -> None:
        """Take bytes of the body; all that came of those before must have been taken."""

    @abc.abstractmethod
    def take(self, most: int) -> bytes:
        """Return up to ``most`` bytes; b"" if more must be fed. Raises :class:`BadCoding`."""

    @property
    @abc.abstractmethod
    def complete(self) -> bool:
        """Whether the body may end here."""


class _Zlib(Decoder):
    """gzip (RFC 1952), of several members also; deflate (RFC 1950), and without its header, as some servers send it."""

    def __init__(self, *, gzip: bool) -> None:
        self._gzip = gzip
        self._waiting = b""
        self._engine: Any = None  # the type of zlib's objects has no name
        self._begun = False

    def feed(self, data: bytes) -> None:
        self._waiting += data

    def take(self, most: int) -> bytes:
        while self._waiting or (self._engine is not None and not self._engine.eof):
            if self._engine is None:
                if not self._gzip and not self._begun and len(self._waiting) < 2:
                    return b""
                if self._begun and not self._gzip:
                    raise BadCoding("bytes behind the end")
                self._engine = zlib.decompressobj(31 if self._gzip else self._deflate_bits())
                self._begun = True
            try:
                out: bytes = self._engine.decompress(self._waiting, most)
            except zlib.error as error:
                raise BadCoding(str(error)) from error
            if self._engine.eof:
                self._waiting = self._engine.unused_data
                self._engine = None
            else:
                self._waiting = self._engine.unconsumed_tail
            if out:
                return out
            if self._engine is not None and not self._waiting:
                return b""
        return b""

    def _deflate_bits(self) -> int:
        first, second = self._waiting[0], self._waiting[1]
        return 15 if first & 15 == 8 and (first << 8 | second) % 31 == 0 else -15

    @property
    def complete(self) -> bool:
        return self._engine is None and self._begun and not self._waiting


class _Brotli(Decoder):
    """br (RFC 7932)."""

    def __init__(self) -> None:
        self._library: Any = importlib.import_module("brotli")
        self._engine: Any = self._library.Decompressor()
        self._waiting = b""

    def feed(self, data: bytes) -> None:
        self._waiting += data

    def take(self, most: int) -> bytes:
        engine = self._engine
        if engine.is_finished():
            if self._waiting:
                raise BadCoding("bytes behind the end")
            return b""
        data = b""
        if engine.can_accept_more_data():
            data, self._waiting = self._waiting, b""
        try:  # without data, too: it says nothing of output that it still has
            out: bytes = engine.process(data, output_buffer_limit=most)
        except self._library.error as error:
            raise BadCoding("not br") from error
        return out

    @property
    def complete(self) -> bool:
        return bool(self._engine.is_finished()) and not self._waiting


class _Zstd(Decoder):
    """zstd (RFC 8878), of several frames also."""

    def __init__(self) -> None:
        try:
            self._library: Any = importlib.import_module("compression.zstd")  # Python 3.14
        except ImportError:
            self._library = importlib.import_module("backports.zstd")
        self._engine: Any = None
        self._waiting = b""
        self._begun = False

    def feed(self, data: bytes) -> None:
        self._waiting += data

    def take(self, most: int) -> bytes:
        while self._waiting or (self._engine is not None and not self._engine.needs_input):
            if self._engine is None:
                window = self._library.DecompressionParameter.window_log_max
                self._engine = self._library.ZstdDecompressor(options={window: _WINDOW_LOG})
                self._begun = True
            data, self._waiting = self._waiting, b""
            try:
                out: bytes = self._engine.decompress(data, max_length=most)
            except self._library.ZstdError as error:
                raise BadCoding("not zstd, or one with too large a window") from error
            if self._engine.eof:
                self._waiting = self._engine.unused_data
                self._engine = None
            if out:
                return out
        return b""

    @property
    def complete(self) -> bool:
        return self._engine is None and self._begun and not self._waiting


_DECODERS: Final[dict[str, Callable[[], Decoder]]] = {
    "gzip": lambda: _Zlib(gzip=True),
    "x-gzip": lambda: _Zlib(gzip=True),
    "deflate": lambda: _Zlib(gzip=False),
    "br": _Brotli,
    "zstd": _Zstd,
}


def decoder(coding: str) -> Decoder | None:
    """Return a decoder of a coding (in lower case), None for one that is not known here or not installed."""
    make = _DECODERS.get(coding)
    try:
        return None if make is None else make()
    except ImportError:
        return None


def codings() -> frozenset[str]:
    """Return the codings for which there is a decoder here."""
    return frozenset(coding for coding in _DECODERS if _installed(coding))


def _installed(coding: str) -> bool:
    try:
        if coding == "zstd":
            _Zstd()
        elif coding == "br":
            _Brotli()
    except ImportError:
        return False
    return True

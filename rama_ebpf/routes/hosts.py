"""Names to the routes that mean them: one walk over a name's labels, and one pass of RE2 for globs and expressions.

Which routes match is a number with a bit for each, so that conditions are joined by one ``&``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import re2

from .model import RouteError

__all__ = ["HostIndex", "canonical_host"]

_MAX_PATTERN: Final = 1000
_MEMORY: Final = 64 << 20
_STRANGE: Final = re.compile(r"[\s\[\]/:@\\\x00]")
_GLOB: Final = {"*": "[^.]*", "?": "[^.]"}


def canonical_host(host: str) -> str:
    """Return a name as it is compared: in lower case, in its ASCII form (IDNA), without the root's dot."""
    text = host.lower().removesuffix(".")
    if text.isascii():
        return text
    try:
        return text.encode("idna").decode("ascii")
    except UnicodeError:
        return text


class HostIndex:
    """Patterns, each with the bits of the routes that have it: ``name.example`` is that name, ``*.name.example`` all
    below it, ``.name.example`` both, ``*`` every name; anything else with ``*`` or ``?`` is a glob within labels."""

    def __init__(self) -> None:
        self._exact: dict[str, int] = {}
        self._below: dict[str, int] = {}
        self._every = 0
        self._sources: dict[str, int] = {}
        self._set: re2.Set | None = None
        self._set_bits: list[int] = []

    def add_host(self, pattern: str, bits: int) -> None:
        """Add a name, suffix or glob. Raises :class:`RouteError`."""
        if pattern == "*":
            self._every |= bits
            return
        text = canonical_host(pattern)
        bad = RouteError(
            f"{pattern[:80]!r} is not a host pattern: write name.example, *.name.example, .name.example or a glob"
        )
        name = text[2:] if text.startswith("*.") else text.removeprefix(".")
        if not name or _STRANGE.search(name) is not None or len(name) > 253 or "" in name.split("."):
            raise bad
        if "*" in name or "?" in name:
            if name == "*":
                raise bad
            self.add_regex(_glob(text), bits, shown=pattern)
            return
        if not text.startswith("*."):
            self._exact[name] = self._exact.get(name, 0) | bits
        if text[0] in "*.":
            self._below[name] = self._below.get(name, 0) | bits

    def add_regex(self, source: str, bits: int, *, shown: str | None = None) -> None:
        """Add an expression in RE2's syntax, which has to match the whole name. Raises :class:`RouteError`."""
        if len(source) > _MAX_PATTERN:
            raise RouteError(f"an expression of {len(source)} characters: {_MAX_PATTERN} at most")
        try:
            re2.compile(source, _options(1 << 20))
        except re2.error as error:
            raise RouteError(f"expression {(shown or source)[:80]!r}: {_text(error)} (RE2 syntax)") from None
        self._sources[source] = self._sources.get(source, 0) | bits
        self._set = None

    def freeze(self) -> None:
        """Make it ready to be asked. Raises :class:`RouteError`."""
        self._share()
        if not self._sources:
            return
        made = re2.Set.FullMatchSet(_options(_MEMORY))
        for source in self._sources:
            made.Add(source)
        made.Compile()
        self._set, self._set_bits = made, list(self._sources.values())
        made.Match("a.example")  # the first one builds what all use

    def _share(self) -> None:
        """Equal masks are one object: a hundred thousand names of one route cost no more than one."""
        known: dict[int, int] = {}
        for table in (self._exact, self._below):
            for name, bits in table.items():
                table[name] = known.setdefault(bits, bits)

    def find(self, name: str) -> int:
        """Return the bits of all that match a canonical name."""
        found = self._every | self._exact.get(name, 0)
        below = self._below
        if below:
            at = name.find(".")
            while at >= 0:
                if (bits := below.get(name[at + 1 :])) is not None:
                    found |= bits
                at = name.find(".", at + 1)
        if self._set is not None:
            for index in self._set.Match(name) or ():
                found |= self._set_bits[index]
        return found

    def __len__(self) -> int:
        return len(self._exact) + len(self._below) + len(self._sources) + bool(self._every)


def _glob(text: str) -> str:
    return "".join(_GLOB.get(character) or re.escape(character) for character in text)


def _text(error: BaseException) -> str:
    told = error.args[0] if error.args else "it does not compile"
    return told.decode(errors="replace") if isinstance(told, bytes) else str(told)


def _options(memory: int) -> re2.Options:
    options = re2.Options()
    options.max_mem = memory
    options.log_errors = False
    return options


def names_of(patterns: Iterable[str]) -> HostIndex:
    """Return an index of patterns that all have bit 0."""
    index = HostIndex()
    for pattern in patterns:
        index.add_host(pattern, 1)
    index.freeze()
    return index

"""The formats that lists of addresses are published in, each as entries: the number of a line, or of a member, and the
text of an address, a CIDR or a range in it.

What each format looks like is said at its reader, with where it is documented. A reader raises :class:`FormatError`
where the whole is no such list; an entry that makes no sense is yielded as it is, and costs itself.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network, summarize_address_range
from typing import Any, Final

from .prefixes import IPNetwork, unmap_network

__all__ = ["BINARY", "FORMATS", "NO_OPTIONS", "Entry", "FormatError", "FormatOptions", "networks_of", "read_entries"]

Entry = tuple[int, str]


class FormatError(ValueError):
    """The data is not of the format at all."""


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """``path`` names members of JSON, one or several with commas; ``column`` is a column of CSV, by its number from 1
    or by its heading, ``to`` the column of a range's end. ``where`` takes those entries alone of which a column of CSV,
    or a member of MMDB, has one of some values: ``country.iso_code=XX|YY``, ``3=XX``."""

    path: str = ""
    column: str = "1"
    to: str = ""
    delimiter: str = ","
    where: str = ""


NO_OPTIONS: Final = FormatOptions()
_MOST_OF_A_RANGE: Final = 256
"""A range is at most so many networks: any IPv4 range is 62 at most, any IPv6 range 254."""


def networks_of(text: str) -> list[IPNetwork]:
    """Return the networks of an entry: an address, a CIDR, one with a netmask, or a range ``a-b``. Raises
    ValueError."""
    first, dash, last = text.partition("-")
    if dash:
        begin, end = _address(first.strip()), _address(last.strip())
        if begin.version != end.version:
            raise ValueError(f"{text!r} begins and ends in different families")
        if int(end) < int(begin):
            raise ValueError(f"{text!r} ends before it begins")
        found = [unmap_network(network) for network in summarize_address_range(begin, end)]
        assert len(found) <= _MOST_OF_A_RANGE
        return found
    return [unmap_network(ip_network(text))]


def _address(text: str) -> IPv4Address | IPv6Address:
    octets = text.split(".")
    if len(octets) == 4 and all(octet.isdecimal() for octet in octets):  # P2P and DShield pad with zeros
        return IPv4Address(".".join(str(int(octet)) if len(octet) <= 3 else octet for octet in octets))
    return ip_address(text)


def _lines(data: bytes, comments: str = "#;") -> Iterator[Entry]:
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        for mark in comments:
            line = line.partition(mark)[0]
        if line := line.strip():
            yield number, line


def _range(data: bytes, _options: FormatOptions) -> Iterator[Entry]:
    """``198.51.100.0 - 198.51.100.255`` a line, or a network."""
    yield from _lines(data)


def _p2p(data: bytes, _options: FormatOptions) -> Iterator[Entry]:
    """``Name of somebody:198.51.100.0-198.51.100.255``: PeerGuardian's text format, also of eMule and blocklists for
    BitTorrent clients. Names have colons, too."""
    for number, line in _lines(data, "#"):
        yield number, line.rpartition(":")[2].strip()


def _ipset(data: bytes, _options: FormatOptions) -> Iterator[Entry]:
    """``ipset save``, ipset(8): ``create`` and ``flush`` are passed over, of ``add NAME ENTRY …`` the entry is taken.
    What has a port, or is an exception (``nomatch``), is no network."""
    for number, line in _lines(data, "#"):
        words = line.split()
        if words[0] in ("create", "-N", "flush", "-F", "COMMIT", "-X", "destroy", "swap", "rename"):
            continue
        if words[0] not in ("add", "-A") or len(words) < 3:
            yield number, line
            continue
        yield number, f"{words[2]} nomatch" if "nomatch" in words[3:] else words[2]


_SOURCE: Final = re.compile(r"(!\s+)?(?:-s|--source|--src|--src-range)\s+(!\s+)?(\S+)")


def _iptables(data: bytes, _options: FormatOptions) -> Iterator[Entry]:
    """``iptables-save``, iptables-save(8): the sources of rules that DROP or REJECT. A rule without a source is not
    about one; one that negates it is no network."""
    for number, line in _lines(data, "#"):
        if line[0] in "*:" or line == "COMMIT":
            continue
        if not re.match(r"(?:\[\d+:\d+\]\s+)?-[AI]\s", line):
            yield number, line
            continue
        if not re.search(r"-j\s+(?:DROP|REJECT)\b", line):
            continue
        for before, behind, text in _SOURCE.findall(line):
            for one in text.split(","):
                yield number, f"! {one}" if before or behind else one


def _dshield(data: bytes, _options: FormatOptions) -> Iterator[Entry]:
    """DShield's block list: start, end, netmask and more, with tabs; one line of headings."""
    for number, line in _lines(data, "#"):
        fields = line.split("\t") if "\t" in line else line.split()
        if fields[0].strip().lower() == "start":
            continue
        yield number, f"{fields[0].strip()}-{fields[1].strip()}" if len(fields) > 1 else line


def _hosts_deny(data: bytes, _options: FormatOptions) -> Iterator[Entry]:
    """``daemons : clients [: options]``, hosts_access(5): addresses, ``198.51.100.``, networks with a length or a
    netmask, ``[2001:db8::]/32``. Names, ALL, wildcards and EXCEPT are no networks."""
    text = data.decode(errors="replace").replace("\\\r\n", "  ").replace("\\\n", " ")
    for number, line in _lines(text.encode(), "#"):
        _daemons, colon, rest = line.partition(":")
        if not colon:
            yield number, line
            continue
        rest = rest.strip()
        clients = _without_options(rest)
        words = re.split(r"[,\s]+", clients.strip())
        if "EXCEPT" in words:
            yield number, clients.strip()
            continue
        for word in filter(None, words):
            yield number, _hosts_word(word)


def _without_options(rest: str) -> str:
    """The clients of a line: up to a colon outside of brackets."""
    inside = False
    for at, letter in enumerate(rest):
        if letter in "[]":
            inside = letter == "["
        elif letter == ":" and not inside:
            return rest[:at]
    return rest


def _hosts_word(word: str) -> str:
    if word.startswith("["):
        return word.replace("[", "").replace("]", "")
    octets = word.removesuffix(".").split(".")
    if word.endswith(".") and 1 <= len(octets) <= 3 and all(octet.isdecimal() for octet in octets):
        return f"{'.'.join([*octets, *['0'] * (4 - len(octets))])}/{8 * len(octets)}"
    return word


def _csv(data: bytes, options: FormatOptions) -> Iterator[Entry]:
    """RFC 4180, with any delimiter; by number, the first row is one of headings if it is no network, and others are."""
    text = "\n".join(
        "" if line.lstrip().startswith("#") else line for line in data.decode(errors="replace").splitlines()
    )
    rows = csv.reader(io.StringIO(text), delimiter=options.delimiter)
    wanted: list[int] | None = None
    where = _Where.of(options.where)
    names = [name for name in (options.column, options.to, "" if where is None else where.what) if name]
    if all(name.isdecimal() for name in names):
        wanted = [int(name) - 1 for name in names]
    is_first = True
    count = len(names) - (where is not None)
    try:
        for row in rows:
            if not row or not "".join(row).strip():
                continue
            if wanted is None:
                heads = [head.strip() for head in row]
                missing = [name for name in names if name not in heads]
                if missing:
                    raise FormatError(f"has no column {missing[0]}; there are {', '.join(heads)[:200]}")
                wanted = [heads.index(name) for name in names]
                continue
            taken = wanted[:count]
            if where is not None:
                at = wanted[-1]
                if not (0 <= at < len(row) and where.holds(row[at])):
                    is_first = False
                    continue
            fields = [_undecimal(row[at].strip()) if 0 <= at < len(row) else "" for at in taken]
            if is_first and not any(field[:1].isdigit() or ":" in field for field in fields):
                is_first = False
                continue
            is_first = False
            yield rows.line_num, "-".join(fields) if all(fields) else options.delimiter.join(row)[:80]
    except csv.Error as error:
        raise FormatError(f"is no CSV: {error}") from error


@dataclass(frozen=True, slots=True)
class _Where:
    """Which entries are wanted."""

    what: str
    values: frozenset[str]

    @classmethod
    def of(cls, text: str) -> _Where | None:
        """Parse ``what=value|value``. Raises :class:`FormatError`."""
        if not text:
            return None
        what, equals, values = text.partition("=")
        found = frozenset(value.strip().casefold() for value in values.split("|") if value.strip())
        if not equals or not what.strip() or not found:
            raise FormatError(f"where = {text!r}: write for example country.iso_code=XX|YY")
        return cls(what.strip(), found)

    def holds(self, value: object) -> bool:
        """Whether it is one of the values."""
        return str(value).strip().casefold() in self.values


def _mmdb(data: bytes, options: FormatOptions) -> Iterator[Entry]:
    """MaxMind DB (maxmind.github.io/MaxMind-DB): networks with a record each, of which ``where`` takes some."""
    if MMDB is None:
        raise FormatError("takes the package maxminddb (pip install 'rama-ebpf[origins]')")
    where = _Where.of(options.where)
    if where is None:
        raise FormatError("names all addresses there are: say which with where")
    steps, number = _steps(where.what), 0
    try:
        with MMDB.open_database(io.BytesIO(data), MMDB.MODE_FD) as reader:
            edition = reader.metadata().binary_format_major_version
            if edition != _MMDB_EDITION:
                raise FormatError(f"is an MMDB of format {edition}; {_MMDB_EDITION} is known")
            for network, record in reader:
                if any(where.holds(value) for value in _follow(record, steps)):
                    number += 1
                    yield number, str(network)
    except FormatError:
        raise
    except (MMDB.InvalidDatabaseError, ValueError, TypeError, LookupError, RecursionError, OverflowError) as error:
        raise FormatError(f"is no MMDB, or a damaged one ({type(error).__name__})") from error


_MMDB_EDITION: Final = 2


def _library() -> Any:
    try:
        return importlib.import_module("maxminddb")
    except ModuleNotFoundError:
        return None


MMDB: Final = _library()
"""Imported beforehand: whoever parses strangers' bytes opens no files."""


def _undecimal(text: str) -> str:
    """An IPv4 address as databases of places have it, as one number, is written as others."""
    if 4 <= len(text) <= 10 and text.isdecimal() and text.isascii() and int(text) < 1 << 32:
        return str(IPv4Address(int(text)))
    return text


def _json(data: bytes, options: FormatOptions) -> Iterator[Entry]:
    """A document, or one a line (JSON Lines); ``path`` leads to texts: ``prefixes[].ip_prefix`` takes that member of
    each element of the array. An object without it has nothing to say; what is there and is no text is no network."""
    paths = [_steps(path) for path in (options.path or "[]").split(",")]
    number = 0
    for document in _documents(data):
        for steps in paths:
            for found in _follow(document, steps):
                number += 1
                yield number, found if isinstance(found, str) else f"no text: {json.dumps(found)[:80]}"


def _documents(data: bytes) -> Iterable[object]:
    text = data.decode(errors="replace")
    try:
        return [json.loads(text)]
    except RecursionError as error:
        raise FormatError("is no JSON: too deep") from error
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or not lines[0].lstrip().startswith("{"):
            raise FormatError(f"is no JSON: {getattr(error, 'msg', error)}") from error
        return _json_lines(lines)


def _json_lines(lines: Iterable[str]) -> Iterator[object]:
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"is no JSON: line {number}") from error


def _steps(path: str) -> list[str]:
    steps = []
    for part in path.strip().split("."):
        name, brackets, _ = part.partition("[]")
        steps += [name] if name else []
        steps += ["[]"] * part.count("[]") if brackets else []
    return steps


def _follow(value: object, steps: list[str]) -> Iterator[object]:
    if not steps:
        if isinstance(value, list):
            yield from value
        else:
            yield value
        return
    step, rest = steps[0], steps[1:]
    if step == "[]":
        if isinstance(value, list):
            for item in value:
                yield from _follow(item, rest)
    elif isinstance(value, Mapping) and value.get(step) is not None:
        yield from _follow(value[step], rest)


FORMATS: Final[Mapping[str, Callable[[bytes, FormatOptions], Iterator[Entry]] | None]] = {
    "plain": None,
    "range": _range,
    "p2p": _p2p,
    "ipset": _ipset,
    "iptables": _iptables,
    "dshield": _dshield,
    "hosts-deny": _hosts_deny,
    "csv": _csv,
    "json": _json,
    "mmdb": _mmdb,
}
"""Readers by the name of their format; ``plain`` is :func:`.feed.parse_feed`'s own."""


BINARY: Final = frozenset({"mmdb"})
"""Formats that are no text."""


def read_entries(data: bytes, name: str, options: FormatOptions) -> Iterator[Entry]:
    """Yield the entries of data of a format. Raises :class:`FormatError`."""
    reader = FORMATS[name]
    assert reader is not None
    return reader(data, options)

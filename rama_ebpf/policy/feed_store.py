"""Feeds read from files and URLs, with the last good copy of each kept for when it cannot be had or is bad."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .atomic import open_regular, write_atomically
from .feed import FeedContent, FeedError, judge_feed
from .feed_record import V6_BYTES, decode, encode
from .feed_room import FeedRoom
from .fetch import Answer, Fetcher, FetchError
from .rule import Feed

__all__ = ["FeedState", "FeedStore", "Loaded"]

log = logging.getLogger(__name__)

_FEW: Final = 100
"""A list of fewer networks may change by any share."""
_MOST_TROUBLE: Final = 1000
_COPY_BYTES: Final = 2 * 1024 * 1024
"""What a copy may have beside its networks."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What to use of a feed, and why it is not fresh, if it is not. ``retry_after`` is in how many seconds its server
    wants to be asked again, if it said so."""

    content: FeedContent
    stale: str = ""
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class FeedState:
    """When a feed's last good copy was fetched, when it was read last (seconds of the wall clock; None if not known),
    and what was wrong then ("" if nothing)."""

    fetched: float | None = None
    checked: float | None = None
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class _Kept:
    content: FeedContent
    validators: dict[str, str]
    fetched: float
    """seconds of the wall clock"""


class FeedStore:
    """Loads feeds, with children in ``room``, and keeps the last good copy of each in ``directory``. Thread-safe."""

    def __init__(self, directory: Path, room: FeedRoom | None = None) -> None:
        self._directory = directory
        self._fetcher = Fetcher(room)
        self._said: dict[str, str] = {}
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """End all transfers at once, and begin no others: for a server that stops."""
        self._fetcher.cancel()

    def load(self, feed: Feed) -> Loaded:
        """Read a feed. If it cannot be had or is bad, its last good copy is returned, with the reason.

        Raises :class:`FeedError` if there is neither.
        """
        kept = self._kept(feed)
        try:
            content = self._read(feed, kept)
        except FeedError as error:
            if kept is None:
                raise
            self._note(feed, str(error))
            hours = max(0, time.time() - kept.fetched) / 3600
            if self._is_news(feed, str(error)):
                log.warning("%s; the copy of %.1f hours ago stays in use", error, hours)
            return Loaded(kept.content, str(error), error.retry_after)
        self._is_news(feed, "")
        self._note(feed, "")
        return Loaded(content)

    def at_hand(self, feed: Feed) -> Loaded:
        """Return what can be had without the network: a file, or the last good copy of a URL.

        Raises :class:`FeedError` if there is none.
        """
        if not feed.is_url:
            return self.load(feed)
        kept = self._kept(feed)
        if kept is None:
            raise FeedError(f"feed {feed.source}: not read yet")
        return Loaded(kept.content)

    def _is_news(self, feed: Feed, text: str) -> bool:
        with self._lock:
            before, self._said[feed.source] = self._said.get(feed.source, ""), text
        return text != before

    def _read(self, feed: Feed, kept: _Kept | None) -> FeedContent:
        try:
            answer = self._fetch(feed, kept) if feed.is_url else self._read_file(feed)
        except FetchError as error:
            raise FeedError(f"feed {feed.source}: {error}", error.retry_after) from error
        if answer.content is None:
            if kept is None:
                raise FeedError(f"feed {feed.source}: answered 304, but nothing is kept of it")
            return kept.content
        content = answer.content
        _judge(feed, content)
        if not len(content.prefixes) and kept is not None and len(kept.content.prefixes) and not feed.allow_empty:
            raise FeedError(
                f"feed {feed.source}: had {len(kept.content.prefixes)} networks and now has none "
                f"(if that is meant: allow_empty = true)"
            )
        if kept is not None:
            _judge_change(feed, len(kept.content.prefixes), len(content.prefixes))
        if kept is None or kept.content != content or kept.validators != answer.validators:
            self._keep(feed, content, answer.validators)
        return content

    def _fetch(self, feed: Feed, kept: _Kept | None) -> Answer:
        known = {} if kept is None else kept.validators
        bounds = (feed.timeout, feed.max_size, feed.max_bad)
        return self._fetcher.get(
            feed.source, known, timeout=bounds[0], max_size=bounds[1], max_bad=bounds[2], format=_format(feed)
        )

    def _read_file(self, feed: Feed) -> Answer:
        try:
            # Not to wait for whoever writes, should it be a FIFO.
            fd = os.open(feed.source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FetchError(f"cannot be read: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FetchError("cannot be read: it is not a regular file")
            bounds = (feed.timeout, feed.max_size, feed.max_bad)
            return self._fetcher.read(
                fd, timeout=bounds[0], max_size=bounds[1], max_bad=bounds[2], format=_format(feed)
            )
        finally:
            os.close(fd)

    # -- copies: a line of JSON with the checksum of the record, then the record ---------------------------------------

    def _path(self, feed: Feed) -> Path:
        facts = _format(feed)
        text = feed.source if facts["format"] == "plain" else f"{feed.source}\n{json.dumps(facts, sort_keys=True)}"
        return self._directory / hashlib.sha256(text.encode()).hexdigest()[:32]

    def _state_path(self, feed: Feed) -> Path:
        return self._directory.with_name("feed-state") / self._path(feed).name

    def state(self, feed: Feed) -> FeedState:
        """Return how old the last good copy is, and what is wrong with the feed, as far as anybody has noted."""
        fetched = _first_line(self._path(feed)).get("fetched")
        said = _first_line(self._state_path(feed))
        checked, trouble = said.get("checked"), said.get("trouble")
        return FeedState(
            float(fetched) if isinstance(fetched, int | float) else None,
            float(checked) if isinstance(checked, int | float) else None,
            trouble if isinstance(trouble, str) else "",
        )

    def _note(self, feed: Feed, trouble: str) -> None:
        """Note when a feed was read, and what was wrong, for whoever asks; a disk that refuses costs that alone."""
        row = {"source": feed.source, "checked": time.time(), "trouble": trouble[:_MOST_TROUBLE]}
        try:
            write_atomically(self._state_path(feed), json.dumps(row).encode())
        except OSError as error:
            log.debug("cannot note the state of feed %s: %s", feed.source, error)

    def _kept(self, feed: Feed) -> _Kept | None:
        try:
            with open(open_regular(self._path(feed), os.O_RDONLY), "rb") as file:
                copy = file.read(feed.max_size * V6_BYTES + _COPY_BYTES)
            line, _, record = copy.partition(b"\n")
            fields = json.loads(line)
            if fields["sha256"] != hashlib.sha256(record).hexdigest():
                raise ValueError("its checksum is wrong")
            if "format" not in fields:  # of versions that kept the text; it is read anew
                return None
            content, _ = decode(record)
            _judge(feed, content)
            fetched = float(fields["fetched"])
            if not math.isfinite(fetched):
                raise ValueError("its time is none")
            return _Kept(content, {str(name): str(value) for name, value in fields["validators"].items()}, fetched)
        except FileNotFoundError:
            return None
        except FeedError as error:
            log.warning("the copy of it is not used: %s", error)
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            log.warning("the copy of feed %s is damaged and not used: %s", feed.source, error)
            return None

    def _keep(self, feed: Feed, content: FeedContent, validators: dict[str, str]) -> None:
        """A file system that refuses is logged as an error: the feed is good, and only its copy is missing."""
        record = encode(content)
        fields = {
            "format": 2,
            "source": feed.source,
            "fetched": time.time(),
            "validators": validators,
            "sha256": hashlib.sha256(record).hexdigest(),
        }
        try:
            write_atomically(self._path(feed), json.dumps(fields).encode() + b"\n" + record)
        except OSError as error:
            log.error("cannot keep a copy of feed %s: %s", feed.source, error)


def _first_line(path: Path) -> Mapping[str, object]:
    """What a file's first line says in JSON; nothing where there is none, or it makes no sense."""
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            row = json.loads(file.readline(_COPY_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _format(feed: Feed) -> dict[str, str]:
    """The format of a feed, with the options that it has."""
    of = {"json": ("path",), "csv": ("column", "to", "delimiter", "where"), "mmdb": ("where",)}.get(feed.format, ())
    return {"format": feed.format} | {name: getattr(feed, name) for name in of}


def _judge_change(feed: Feed, before: int, after: int) -> None:
    """Raise :class:`FeedError` for a list that is another one of a sudden. Short lists may change as they like."""
    if not feed.max_change or before < _FEW or not after:
        return
    if not before * (1 - feed.max_change) <= after <= before * (1 + feed.max_change):
        raise FeedError(
            f"feed {feed.source}: had {before} networks and now has {after}, a change of more than "
            f"{feed.max_change:.0%} (if that is meant: policy refresh --accept)"
        )


def _judge(feed: Feed, content: FeedContent) -> None:
    """Raise :class:`FeedError` for what must not be put into force."""
    try:
        judge_feed(content, feed.max_bad)
    except FeedError as error:
        raise FeedError(f"feed {feed.source}: {error}") from error
    everybody = "" if feed.allow_default else content.everybody()
    if everybody:
        raise FeedError(f"feed {feed.source}: names every {everybody} address (if that is meant: allow_default = true)")

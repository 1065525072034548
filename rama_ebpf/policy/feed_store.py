"""Feeds read from files and URLs, with the last good copy of each kept for when it cannot be had or is bad."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from .atomic import write_atomically
from .feed import FeedContent, FeedError, parse_feed
from .fetch import Fetcher, FetchError
from .gzipped import unpack
from .rule import Feed

__all__ = ["FeedStore", "Loaded"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What to use of a feed, and why it is not fresh, if it is not."""

    content: FeedContent
    stale: str = ""


@dataclass(frozen=True, slots=True)
class _Kept:
    data: bytes
    validators: dict[str, str]
    fetched: float
    """seconds of the wall clock"""


class FeedStore:
    """Loads feeds, and keeps the last good copy of each in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fetcher = Fetcher()

    def cancel(self) -> None:
        """End all transfers at once, and begin no others: for a server that stops."""
        self._fetcher.cancel()

    def load(self, feed: Feed) -> Loaded:
        """Read a feed. If it cannot be had or is bad, its last good copy is returned, with the reason.

        Raises :class:`FeedError` if there is neither.
        """
        kept = self._kept(feed)
        try:
            return Loaded(self._read(feed, kept))
        except FeedError as error:
            if kept is None:
                raise
            hours = max(0, time.time() - kept.fetched) / 3600
            log.warning("%s; the copy of %.1f hours ago stays in use", error, hours)
            return Loaded(_parse(feed, kept.data), str(error))

    def at_hand(self, feed: Feed) -> Loaded:
        """Return what can be had without the network: a file, or the last good copy of a URL.

        Raises :class:`FeedError` if there is none.
        """
        if not feed.is_url:
            return self.load(feed)
        kept = self._kept(feed)
        if kept is None:
            raise FeedError(f"feed {feed.source}: not read yet")
        return Loaded(_parse(feed, kept.data))

    def _read(self, feed: Feed, kept: _Kept | None) -> FeedContent:
        validators: dict[str, str] = {}
        if feed.is_url:
            try:
                known = {} if kept is None else kept.validators
                answer = self._fetcher.get(feed.source, known, timeout=feed.timeout, max_size=feed.max_size)
            except FetchError as error:
                raise FeedError(f"feed {feed.source}: {error}") from error
            if answer.data is None:
                if kept is None:
                    raise FeedError(f"feed {feed.source}: answered 304, but nothing is kept of it")
                return _parse(feed, kept.data)
            data, validators = answer.data, answer.validators
        else:
            data = _read_file(feed)
        content = _parse(feed, data)
        if kept is None or kept.data != data or kept.validators != validators:
            self._keep(feed, data, validators)
        return content

    # -- copies: a line of JSON with the checksum of the data, then the data -------------------------------------------

    def _path(self, feed: Feed) -> Path:
        return self._directory / hashlib.sha256(feed.source.encode()).hexdigest()[:32]

    def _kept(self, feed: Feed) -> _Kept | None:
        try:
            head, _, data = self._path(feed).read_bytes().partition(b"\n")
            fields = json.loads(head)
            if fields["sha256"] != hashlib.sha256(data).hexdigest():
                raise ValueError("its checksum is wrong")
            return _Kept(data, dict(fields["validators"]), float(fields["fetched"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the copy of feed %s is damaged and not used: %s", feed.source, error)
            return None

    def _keep(self, feed: Feed, data: bytes, validators: dict[str, str]) -> None:
        """A file system that refuses is logged as an error: the feed is good, and only its copy is missing."""
        fields = {
            "source": feed.source,
            "fetched": time.time(),
            "validators": validators,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        try:
            write_atomically(self._path(feed), json.dumps(fields).encode() + b"\n" + data)
        except OSError as error:
            log.error("cannot keep a copy of feed %s: %s", feed.source, error)


def _parse(feed: Feed, data: bytes) -> FeedContent:
    try:
        return parse_feed(data, max_bad=feed.max_bad)
    except FeedError as error:
        raise FeedError(f"feed {feed.source}: {error}") from error


def _read_file(feed: Feed) -> bytes:
    try:
        with open(feed.source, "rb") as file:
            data = file.read(feed.max_size + 1)
    except OSError as error:
        raise FeedError(f"feed {feed.source}: cannot be read: {error.strerror}") from error
    try:
        return unpack(data, feed.max_size)
    except ValueError as error:
        raise FeedError(f"feed {feed.source}: {error}") from error

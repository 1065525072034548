"""A rule set as bytes: kept beside its compiled form, so that what is in force can be listed, exported and compared.

A JSON header with everything but the sources, then the sources packed: a million prefixes take milliseconds.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from array import array
from typing import Final

from .prefixes import Prefixes
from .rule import Action, Feed, PolicyError, Rule, RuleSet, Settings, SynLimit

__all__ = ["decode", "encode"]

_HEADER: Final = struct.Struct("=I")


def _limit(limit: SynLimit | None) -> list[float] | None:
    return None if limit is None else [limit.rate, limit.burst]


def _to_limit(value: list[float] | None) -> SynLimit | None:
    return None if value is None else SynLimit(value[0], int(value[1]))


def encode(ruleset: RuleSet) -> bytes:
    """Return the bytes of a rule set."""
    rows = []
    blocks = []
    for rule in ruleset.rules:
        v4, v6 = rule.packed(4), rule.packed(6)
        rows.append(
            {
                "name": rule.name,
                "action": rule.action.name,
                "port": rule.port,
                "expires": rule.expires,
                "dry_run": rule.dry_run,
                "limit": _limit(rule.limit),
                "reason": rule.reason,
                "origin": rule.origin,
                "feed": None if rule.feed is None else _said(rule.feed),
                "counts": [len(v4), len(v6)],
            }
        )
        blocks.append(array("Q", v4).tobytes())
        blocks.append(b"".join([packed.to_bytes(17, "big") for packed in v6]))
    settings = ruleset.settings
    header = {
        "rules": rows,
        "default": settings.default.name,
        "per_source": _limit(settings.per_source),
        "overall": _limit(settings.overall),
        "places": [rule.at for rule in ruleset.rules],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    return _HEADER.pack(len(text)) + text + b"".join(blocks)


def _said(feed: Feed) -> dict[str, object]:
    """What of a feed differs from where nothing is said: a version that does not know an option reads the set as long
    as nobody uses it, and refuses it else."""
    return {
        one.name: getattr(feed, one.name)
        for one in dataclasses.fields(feed)
        if getattr(feed, one.name) != one.default  # MISSING, which nothing equals, where it has to be said
    }


def decode(data: bytes) -> RuleSet:
    """The inverse of :func:`encode`. Raises :class:`PolicyError` for bytes that it did not make."""
    try:
        size = _HEADER.unpack_from(data)[0]
        at = _HEADER.size + size
        header = json.loads(data[_HEADER.size : at])
        rules = []
        places = header.get("places", [""] * len(header["rules"]))  # none before layout 5
        for row, place in zip(header["rules"], places, strict=True):
            count4, count6 = row.pop("counts")
            v4 = array("Q")
            v4.frombytes(data[at : at + 8 * count4])
            at += 8 * count4
            v6 = [int.from_bytes(data[i : i + 17], "big") for i in range(at, at + 17 * count6, 17)]
            at += 17 * count6
            row["action"] = Action[row["action"]]
            row["limit"] = _to_limit(row["limit"])
            row["feed"] = None if row["feed"] is None else Feed(**row["feed"])
            rules.append(Rule(sources=Prefixes.from_sorted(v4, v6), at=place, **row))
        settings = Settings(Action[header["default"]], _to_limit(header["per_source"]), _to_limit(header["overall"]))
    except (struct.error, KeyError, TypeError, ValueError) as error:
        raise PolicyError(f"not an encoded rule set: {error}") from error
    return RuleSet(tuple(rules), settings)

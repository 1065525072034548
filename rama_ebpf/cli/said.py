"""The words of a change: what was asked for, and what is enforced, which is told by who decides."""

from __future__ import annotations

import sys
from typing import cast

from ..control.api import Json
from .output import ENVIRONMENT, OK

__all__ = ["outcome", "outcome_of_set", "still_denied"]

_EXAMPLES = 3


def _come_first(rows: list[Json]) -> str:
    """Who decides otherwise, with an example each."""
    parts = [f"{row['by']} comes first ({row['source']} to {row['listener']})" for row in rows[:_EXAMPLES]]
    more = len(rows) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _unasked(enforced: Json) -> str:
    """Why nobody can say that it is in force; the empty text if somebody has."""
    if enforced["state"] is None:
        return f"the kernel could not be asked whether it is in force: {enforced['why']}"
    return ""


def note_where_nobody_serves(enforced: Json) -> None:
    """Say on stderr that no server enforces anything now, and which guards do."""
    if enforced["serving"]:
        return
    if guards := cast("list[int]", enforced.get("guards") or []):
        by = f"process{'es' * (len(guards) > 1)} {', '.join(map(str, guards))}"
        print(f"no server runs: in force where the guard of {by} is, and when a server starts", file=sys.stderr)
    else:
        print("no server runs: it will be in force when one starts", file=sys.stderr)


def _unknown(done: str, enforced: Json) -> tuple[str, int] | None:
    """What to say where the kernel was not asked, because no server runs or it could not be; None if it was."""
    note_where_nobody_serves(enforced)
    if not (why := _unasked(enforced)):
        return None
    return (f"{done}: recorded, but {why}", ENVIRONMENT) if enforced["serving"] else (done, OK)


def outcome(done: str, result: Json) -> tuple[str, int]:
    """Return the words and the exit code of a change. ``done`` says that it is done, ``result`` is the server's."""
    enforced = cast("Json | None", result.get("enforced"))
    if enforced is None:
        return done, OK
    if (unknown := _unknown(done, enforced)) is not None:
        return unknown
    otherwise, before = cast("list[Json]", enforced["otherwise"]), cast("list[Json]", enforced["before"])
    unguarded = cast("list[str]", enforced["unguarded"])[:_EXAMPLES]
    if unguarded and not enforced["guarded"]:
        return f"recorded, not enforced: {'; '.join(unguarded)}", ENVIRONMENT
    if enforced["state"] == "none":
        if result.get("dry_run"):
            return f"recorded, but {_come_first(otherwise)}: the dry run is never reached", OK
        return f"recorded, not enforced: {_come_first(otherwise)}", ENVIRONMENT
    if otherwise or unguarded:
        why = "; ".join(([_come_first(otherwise)] if otherwise else []) + unguarded)
        return f"recorded, but {why}; elsewhere {done}", OK
    if before:
        return f"{done} ({', '.join(str(row['by']) for row in before)} comes first, and does the same)", OK
    if enforced["serving"] and not enforced["listening"] and result.get("port") is not None:
        return f"{done} (no listener has port {result['port']})", OK
    return done, OK


def still_denied(done: str, result: Json) -> tuple[str, int]:
    """The same for what takes a block or a ban back: others may turn the source away all the same."""
    enforced = cast("Json | None", result.get("enforced"))
    if enforced is None:
        return done, OK
    if (unknown := _unknown(done, enforced)) is not None:
        return unknown
    otherwise = cast("list[Json]", enforced["otherwise"])
    if not otherwise:
        return done, OK
    by = ", ".join(str(row["by"]) for row in otherwise[:_EXAMPLES])
    return f"recorded, but still turned away: {by}", OK


def outcome_of_set(done: str, result: Json) -> tuple[str, int]:
    """The same for a whole set: rules of it that who decides does not find."""
    if "why" in result:
        return f"{done}: recorded, but the kernel could not be asked: {result['why']}", ENVIRONMENT
    missing = cast("list[str]", result.get("unheard") or [])
    if not missing:
        return done, OK
    return f"recorded, not enforced: {'; '.join(missing[:_EXAMPLES])}", ENVIRONMENT

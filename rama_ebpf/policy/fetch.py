"""Getting a feed over HTTP, in a child process of its own.

What comes from the network is parsed there, as an unprivileged user where the caller is root, and the one deadline for
everything, from the first DNS query to the last byte, is kept by ending the child. A server that hangs, drips or
redirects in circles costs nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["Answer", "FetchError", "fetch"]

_CHILD: Final = "rama_ebpf.policy.fetch_child"


class FetchError(Exception):
    """A URL could not be read; the text says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``data`` is None if the server says that nothing has changed. ``validators`` are what to ask with next time."""

    data: bytes | None
    validators: dict[str, str]


def fetch(url: str, validators: Mapping[str, str], *, timeout: float, max_size: int) -> Answer:
    """GET a URL: at most ``max_size`` bytes, within ``timeout`` seconds. Raises :class:`FetchError`.

    ``validators`` are those of the last :class:`Answer` (RFC 9110 section 8.8), empty to get it in any case.
    """
    request = json.dumps({"url": url, "validators": dict(validators), "timeout": timeout, "max_size": max_size})
    try:
        done = subprocess.run(
            [sys.executable, "-m", _CHILD],
            input=request.encode(),
            capture_output=True,
            timeout=timeout,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"not there within {timeout:g} s") from None
    except OSError as error:
        raise FetchError(f"cannot start a child process: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise FetchError(lines[-1] if lines else f"the child process ended with {done.returncode}")
    head, _, data = done.stdout.partition(b"\n")
    fields = json.loads(head)
    return Answer(None if fields["unchanged"] else data, dict(fields["validators"]))

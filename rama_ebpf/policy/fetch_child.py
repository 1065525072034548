"""The child process of :mod:`.fetch`: one HTTP GET, told by JSON on standard input.

It writes a line of JSON and the body to standard output, or the reason why there is none to standard error.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import sys
import urllib.error
import urllib.request
from typing import IO, Final

from .. import __version__
from ..kernel.privileges import UserIds, can_change_user, die_with_parent, drop_privileges, give_up_capabilities
from .gzipped import unpack

__all__: list[str] = []

_HEAD_BYTES: Final = 64 * 1024
_PYTHON_BYTES: Final = 512 * 1024 * 1024  # of addresses: most are libraries' and never touched
_VALIDATORS: Final = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}


class _OnlyHttp(urllib.request.HTTPRedirectHandler):
    """Follows redirects to HTTP and HTTPS only, and never from HTTPS to HTTP."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not newurl.startswith("https://" if req.full_url.startswith("https://") else ("http://", "https://")):
            raise urllib.error.HTTPError(newurl, code, f"refusing to be redirected to {newurl}", headers, None)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _confine(max_size: int) -> None:
    """Give up all privileges, and the means to fill memory or to start anything."""
    if os.geteuid() == 0 and can_change_user():
        drop_privileges(UserIds.of("nobody"))
    else:  # a user without privileges, or root in a container that gives it none
        give_up_capabilities()
    die_with_parent()
    for limit, value in (
        (resource.RLIMIT_FSIZE, max_size + _HEAD_BYTES),
        (resource.RLIMIT_AS, 5 * max_size + _PYTHON_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def main() -> None:
    wanted = json.load(sys.stdin)
    _confine(wanted["max_size"])
    request = urllib.request.Request(wanted["url"], headers={"User-Agent": f"rama-ebpf/{__version__}"})
    for name, value in wanted["validators"].items():
        request.add_header(_VALIDATORS[name], value)
    opener = urllib.request.build_opener(_OnlyHttp)
    data = b""
    unchanged = False
    try:
        with contextlib.closing(opener.open(request, timeout=wanted["timeout"])) as response:
            headers = response.headers
            data = response.read(wanted["max_size"] + 1)
            length = headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        if error.code != 304:
            reason = " ".join(str(error.reason).split())  # of several lines if redirects go in circles
            raise SystemExit(f"HTTP status {error.code} {reason}") from None
        headers, length, unchanged = error.headers, None, True
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SystemExit(str(getattr(error, "reason", error)) or type(error).__name__) from None
    if len(data) > wanted["max_size"]:
        raise SystemExit(f"longer than {wanted['max_size']} bytes")
    if length is not None and length.isdigit() and int(length) != len(data):
        raise SystemExit(f"cut off: {len(data)} of {length} bytes")
    try:
        data = unpack(data, wanted["max_size"])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    validators = {name: headers[name] for name in _VALIDATORS if headers.get(name)}
    head = {"unchanged": unchanged, "validators": validators or wanted["validators"]}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n")
    sys.stdout.buffer.write(data)


if __name__ == "__main__":
    main()

"""The child process of :mod:`.fetch`: one HTTP GET, told by JSON on standard input.

It writes a line of JSON and the body to standard output, or the reason why there is none to standard error.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from typing import IO, Final

from .. import __version__

__all__: list[str] = []

_NOBODY: Final = 65534
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


def _become_nobody() -> None:
    """Give up root, where that is possible: in some containers it is not, and means little there."""
    with contextlib.suppress(PermissionError):
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)


def main() -> None:
    wanted = json.load(sys.stdin)
    if os.geteuid() == 0:
        _become_nobody()
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
            raise SystemExit(f"HTTP status {error.code} {error.reason}") from None
        headers, length, unchanged = error.headers, None, True
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SystemExit(str(getattr(error, "reason", error)) or type(error).__name__) from None
    if len(data) > wanted["max_size"]:
        raise SystemExit(f"longer than {wanted['max_size']} bytes")
    if length is not None and length.isdigit() and int(length) != len(data):
        raise SystemExit(f"cut off: {len(data)} of {length} bytes")
    validators = {name: headers[name] for name in _VALIDATORS if headers.get(name)}
    head = {"unchanged": unchanged, "validators": validators or wanted["validators"]}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + data)


if __name__ == "__main__":
    main()

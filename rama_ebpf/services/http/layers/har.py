"""Recording exchanges as HAR 1.2 (the HTTP Archive format), which browsers and other tools read."""

from __future__ import annotations

import base64
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from ....core.service import Service
from ..message.headers import Headers
from ..message.model import Body, Request, Response

__all__ = ["HarLayer", "HarRecorder"]

_SECRETS: Final = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie"})
_REDACTED: Final = "(redacted)"


class HarRecorder:
    """Holds the last ``max_entries`` exchanges. Of each body at most ``max_body`` bytes are kept, and the values of
    ``redact`` (names in lower case, by default those that hold credentials) are not recorded. ``save_to`` is where
    :meth:`save` writes it."""

    def __init__(
        self,
        *,
        max_entries: int = 1000,
        max_body: int = 64 * 1024,
        redact: Collection[str] = _SECRETS,
        save_to: Path | None = None,
    ) -> None:
        self._save_to = save_to
        self.max_body = max_body
        self._entries: deque[dict[str, object]] = deque(maxlen=max_entries)
        self._redact = redact

    def add(self, entry: dict[str, object]) -> None:
        """Append an entry of the archive."""
        self._entries.append(entry)

    def archive(self) -> dict[str, object]:
        """Return the archive, ready for :func:`json.dump`."""
        log = {
            "version": "1.2",
            "creator": {"name": "rama_ebpf", "version": "1"},
            "entries": list(self._entries),
        }
        return {"log": log}

    def save(self, path: Path | None = None) -> None:
        """Write the archive to ``path``, or to ``save_to``, readable by its owner only; it is there whole or not at
        all. Raises ValueError if neither is given."""
        path = path or self._save_to
        if path is None:
            raise ValueError("no path: give one to save(), or HarRecorder(save_to=…)")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.archive(), file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def fields(self, headers: Headers) -> list[dict[str, str]]:
        """Return fields as HAR has them."""
        return [
            {"name": name, "value": _REDACTED if name.lower() in self._redact else value} for name, value in headers
        ]


class HarLayer:
    """Records each exchange in ``recorder`` when its response's body is over, or was given up.

    Bodies stream on as they are recorded. ``clock`` is monotonic seconds, ``now`` the wall clock.
    """

    accepts = Request

    def __init__(
        self,
        recorder: HarRecorder,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._recorder = recorder
        self._clock = clock
        self._now = now

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            started, at = self._clock(), self._now()
            sent = request.body = _Recorded(request.body, self._recorder.max_body, lambda: None)
            described = self._request(request)
            response = await inner(request)
            waited = self._clock()

            def over() -> None:
                self._record(described, sent, response, got, at, started, waited)

            got = _Recorded(response.body, self._recorder.max_body, over)
            if response.upgrade is None:
                response.body = got
            else:
                over()
            return response

        return serve

    def _request(self, request: Request) -> dict[str, object]:
        query = parse_qsl(urlsplit(request.path).query, keep_blank_values=True)
        return {
            "method": request.method,
            "url": request.url,
            "httpVersion": _version(request.version),
            "headers": [{"name": "Host", "value": request.authority}, *self._recorder.fields(request.headers)],
            "queryString": [{"name": name, "value": value} for name, value in query],
            "cookies": [],
            "headersSize": -1,
        }

    def _record(
        self,
        request: dict[str, object],
        sent: _Recorded,
        response: Response,
        got: _Recorded,
        at: datetime,
        started: float,
        waited: float,
    ) -> None:
        request["bodySize"] = sent.size
        if sent.size:
            request["postData"] = {"mimeType": "", "params": [], **sent.content()}
        self._recorder.add(
            {
                "startedDateTime": at.isoformat(),
                "time": (self._clock() - started) * 1000,
                "request": request,
                "response": {
                    "status": response.status,
                    "statusText": response.reason,
                    "httpVersion": _version(response.version),
                    "headers": self._recorder.fields(response.headers),
                    "cookies": [],
                    "content": {
                        "size": got.size,
                        "mimeType": response.headers.get("content-type") or "",
                        **got.content(),
                    },
                    "redirectURL": response.headers.get("location") or "",
                    "headersSize": -1,
                    "bodySize": got.size,
                    **({} if got.whole or response.upgrade else {"comment": "the body broke off"}),
                },
                "cache": {},
                "timings": {"send": 0, "wait": (waited - started) * 1000, "receive": (self._clock() - waited) * 1000},
            }
        )


class _Recorded(Body):
    def __init__(self, inner: Body, limit: int, over: Callable[[], None]) -> None:
        self._inner = inner
        self._limit = limit
        self._over = over
        self._kept = bytearray()
        self._told = False
        self.whole = inner.length == 0
        self.size = 0
        self.length = inner.length
        self.expects_continue = inner.expects_continue

    @property
    def ready(self) -> bool:
        return self._inner.ready

    async def next(self) -> bytes:
        chunk = await self._inner.next()
        if chunk:
            self.size += len(chunk)
            self._kept += chunk[: self._limit - len(self._kept)]
        else:
            self.trailers = self._inner.trailers
            self.whole = True
            self._tell()
        return chunk

    async def close(self) -> None:
        await self._inner.close()
        self._tell()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._over()

    def content(self) -> dict[str, object]:
        """Return the kept bytes as ``text``, in base64 if they are none, and a comment if they are not all."""
        comment = {} if len(self._kept) == self.size else {"comment": f"the first {len(self._kept)} bytes"}
        try:
            return {"text": self._kept.decode("utf-8"), **comment}
        except UnicodeDecodeError:
            return {"text": base64.b64encode(self._kept).decode("ascii"), "encoding": "base64", **comment}


def _version(version: str) -> str:
    return f"HTTP/{version}"

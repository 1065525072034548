"""Bodies without their Content-Encoding, for layers that look at them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from ....core.service import Service
from ..message.coding import BadCoding, Decoder, codings, decoder
from ..message.errors import HttpError
from ..message.headers import Headers
from ..message.model import Body, Request, Response

__all__ = ["DecodeLayer"]

_PIECE: Final = 64 * 1024
_MOST_CODINGS: Final = 3
# What tells of the bytes that were sent.
_OF_THE_ENCODED: Final = ("content-encoding", "content-md5", "content-digest", "digest", "accept-ranges")


class DecodeLayer:
    """Decodes the bodies of responses, and of ``requests`` too if wanted, so that layers outside of it (requests:
    inside of it) read them as they are meant: gzip, deflate, and br and zstd where the extra ``codings`` is installed.

    ``max_body`` is how many bytes may come of one body: above it the message breaks off (502, a request 413), as it
    does where it is not of its coding, or ends within it. Pieces of at most 64 KiB are decoded as they are read, so no
    bomb takes more memory than that. Upstreams are asked for no other codings than these. What must not be changed is
    not: ranges (206), ``Cache-Control: no-transform``, a coding that is not known here.
    """

    accepts = Request

    def __init__(self, *, max_body: int = 64 * 1024 * 1024, requests: bool = False) -> None:
        if max_body < 1:
            raise ValueError(f"max_body must be at least 1, not {max_body}")
        self._max_body = max_body
        self._requests = requests
        self._known = codings()

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            headers = request.headers = request.headers.copy()
            if "accept-encoding" in headers:
                headers.set("Accept-Encoding", self._acceptable(headers))
            if self._requests:
                decoded = self._decoded(request.body, headers, _too_large_request, _bad_request)
                if decoded is not None:
                    request.body = decoded
            response = await inner(request)
            bodiless = request.method == "HEAD" or response.status in (204, 206, 304) or response.upgrade is not None
            if not bodiless:
                changed = response.headers.copy()
                decoded = self._decoded(response.body, changed, _too_large_response, _bad_response)
                if decoded is not None:
                    response.body, response.headers = decoded, changed
            return response

        return serve

    def _acceptable(self, headers: Headers) -> str:
        """Accept-Encoding (RFC 9110 section 12.5.3) without what is not known here."""
        members = headers.tokens("accept-encoding")
        kept = [member for member in members if member.partition(";")[0].strip() in self._known | {"identity"}]
        return ", ".join(kept) or "identity"

    def _decoded(
        self, body: Body, headers: Headers, too_large: Callable[[], HttpError], bad: Callable[[], HttpError]
    ) -> Body | None:
        """Return the decoded body, and change ``headers`` to be of it; None if it is to stay as it is."""
        named = [coding for coding in headers.tokens("content-encoding") if coding != "identity"]
        if not named or len(named) > _MOST_CODINGS or body.length == 0:
            return None
        if "no-transform" in headers.tokens("cache-control") or "content-range" in headers:
            return None
        decoders = [decoder(coding) for coding in reversed(named)]
        if None in decoders:
            return None
        for made in decoders:
            assert made is not None
            body = _DecodedBody(body, made, self._max_body, too_large, bad)
        headers.remove(*_OF_THE_ENCODED)
        tag = headers.get("etag")
        if tag is not None and not tag.startswith("W/"):
            headers.set("ETag", f"W/{tag}")  # RFC 9110 section 8.8.1: the bytes are others now
        return body


class _DecodedBody(Body):
    def __init__(
        self,
        inner: Body,
        decoder: Decoder,
        most: int,
        too_large: Callable[[], HttpError],
        bad: Callable[[], HttpError],
    ) -> None:
        self._inner = inner
        self._decoder = decoder
        self._left = most
        self._too_large = too_large
        self._bad = bad
        self._ended = False
        self._failure: HttpError | None = None
        self.length = None
        self.expects_continue = inner.expects_continue

    async def next(self) -> bytes:
        if self._failure is not None:
            raise self._failure
        while not self._ended:
            try:
                out = self._decoder.take(min(_PIECE, self._left + 1))
            except BadCoding as error:
                await self._fail(self._bad(), error)
            if out:
                self._left -= len(out)
                if self._left < 0:
                    await self._fail(self._too_large(), None)
                return out
            chunk = await self._inner.next()
            if chunk:
                self._decoder.feed(chunk)
                continue
            if not self._decoder.complete:
                await self._fail(self._bad(), None)
            self._ended = True
            self.trailers = self._inner.trailers
        return b""

    async def _fail(self, failure: HttpError, cause: BadCoding | None) -> None:
        self._failure = failure
        with contextlib.suppress(OSError):
            await self._inner.close()
        raise failure from cause

    async def close(self) -> None:
        await self._inner.close()


def _too_large_request() -> HttpError:
    return HttpError(413, "the body is too large", close=True)


def _bad_request() -> HttpError:
    return HttpError(400, "the body is not of its Content-Encoding", close=True)


def _too_large_response() -> HttpError:
    return HttpError(502, "the upstream's response is too large", proxy_error="http_response_body_size", close=True)


def _bad_response() -> HttpError:
    text = "the upstream's response is not of its Content-Encoding"
    return HttpError(502, text, proxy_error="http_response_content_coding", close=True)

"""One HTTP GET with Python's own client. Redirects lead where a policy lets them; errors hold no word of a page."""

from __future__ import annotations

import email.utils
import functools
import http
import http.client
import math
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from ipaddress import ip_address
from typing import IO, Any, Final
from urllib.parse import urlsplit

from .. import __version__
from ..core.errors import PolicyDenied
from .egress import EgressPolicy
from .feed_room import same_server

__all__ = ["Ask", "GetError", "Response", "get"]

_VALIDATORS: Final = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
_VALIDATOR_LENGTH: Final = 1024
_SHOWN_URL: Final = 200

Ask = Callable[[str, int, list[str]], None]


class GetError(Exception):
    """There is no whole answer. ``retry_after`` is what the server said, in seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Response:
    """An answer of status 200, or 304."""

    def __init__(self, body: http.client.HTTPResponse | None, headers: Message) -> None:
        self._body = body
        self._length = headers.get("Content-Length")
        self.validators = {
            name: headers[name] for name in _VALIDATORS if 0 < len(headers.get(name) or "") <= _VALIDATOR_LENGTH
        }

    def read(self, max_size: int) -> bytes | None:
        """Return the whole body, None for 304. Raises :class:`GetError`, also for more than ``max_size`` bytes."""
        if self._body is None:
            return None
        try:
            data = self._body.read(max_size + 1)
        except (OSError, http.client.HTTPException) as error:
            raise _error(error) from None
        if len(data) > max_size:
            raise GetError(f"longer than {max_size} bytes")
        if self._length is not None and self._length.isdigit() and int(self._length) != len(data):
            raise GetError(f"cut off: {len(data)} of {self._length} bytes")
        return data

    def close(self) -> None:
        """Close the connection."""
        if self._body is not None:
            self._body.close()


def get(url: str, validators: Mapping[str, str], timeout: float, egress: EgressPolicy, ask: Ask) -> Response:
    """GET a URL, which may be anywhere, for it was named; redirects lead only to where ``egress`` lets connect, or back
    to the same server. Before each connection ``ask`` is called, with a name, a port, and its addresses, which raises
    OSError if it may not be. ``timeout`` seconds bound each wait. Raises :class:`GetError`."""
    request = urllib.request.Request(url, headers={"User-Agent": f"rama-ebpf/{__version__}"})
    for name, value in validators.items():
        request.add_header(_VALIDATORS[name], value)
    opener = urllib.request.build_opener(_Redirects(url, egress), _Http(url, egress, ask), _Https(url, egress, ask))
    try:
        response = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.HTTPStatus.NOT_MODIFIED:
                return Response(None, error.headers)
            raise _status_error(error) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _error(error) from None
    if response.status != http.HTTPStatus.OK:
        response.close()
        raise GetError(f"HTTP status {response.status} is not the whole list")
    return Response(response, response.headers)


def _status_error(error: urllib.error.HTTPError) -> GetError:
    # "From us" are the refusals of redirects; the server's own words are left out.
    if isinstance(error, _RefusedRedirect):
        return GetError(f"HTTP status {error.code} {error.reason}")
    if "infinite loop" in str(error.reason):
        return GetError(f"HTTP status {error.code}: redirected in an infinite loop")
    try:
        words = f" {http.HTTPStatus(error.code).phrase}"
    except ValueError:
        words = ""
    return GetError(f"HTTP status {error.code}{words}", _retry_after(error.headers.get("Retry-After")))


def _error(error: Exception) -> GetError:
    if isinstance(error, http.client.IncompleteRead):
        return GetError(f"cut off: IncompleteRead of {len(error.partial)} bytes")
    if isinstance(error, http.client.HTTPException):
        return GetError(f"the answer is not HTTP ({type(error).__name__})")
    return GetError(str(getattr(error, "reason", error)) or type(error).__name__)


def _retry_after(text: str | None) -> float | None:
    """Seconds, from a number or a date (RFC 9110 section 10.2.3)."""
    if text is None:
        return None
    if text.strip().isdecimal() and len(text) < 12:
        return float(text)
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


# -- redirects --------------------------------------------------------------------------------------------------------


class _RefusedRedirect(urllib.error.HTTPError):
    pass


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to HTTP and HTTPS only, and never from HTTPS to HTTP."""

    def __init__(self, url: str, egress: EgressPolicy) -> None:
        self._first = url
        self._egress = egress

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        shown = "".join(letter if letter.isprintable() else "?" for letter in newurl[:_SHOWN_URL])
        if not newurl.startswith("https://" if req.full_url.startswith("https://") else ("http://", "https://")):
            raise _RefusedRedirect(newurl, code, f"refusing to be redirected to {shown}", headers, fp)
        if not same_server(newurl, self._first):
            host = urlsplit(newurl).hostname or ""
            try:  # here as well, for where a proxy would connect in our place
                _check(self._egress, host, urlsplit(newurl).port)
            except PolicyDenied as error:
                raise _RefusedRedirect(
                    newurl, code, f"refusing to be redirected to {shown}: {error}", headers, fp
                ) from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check(egress: EgressPolicy, host: str, port: int | None) -> None:
    """Raise PolicyDenied for the literal of an address that is denied; names are judged when they are resolved."""
    try:
        ip = ip_address(host.partition("%")[0])
    except ValueError:
        return
    egress.check(ip, port)


def _connector(egress: EgressPolicy | None, ask: Ask) -> Callable[..., socket.socket]:
    """A :func:`socket.create_connection` that connects only to addresses of the name that ``egress`` allows, or to any
    if there is none, and where ``ask`` lets it."""

    def connect(address: tuple[str, int], timeout: float, source_address: Any = None, **_options: Any) -> socket.socket:
        host, port = address
        failure: OSError | None = None
        found = [str(sockaddr[0]) for *_, sockaddr in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        allowed = []
        for ip in found:
            try:
                if egress is not None:
                    _check(egress, ip, port)
            except PolicyDenied as error:
                failure = OSError(f"refusing to be redirected to {host}: {error}")
            else:
                allowed.append(ip)
        if allowed:
            ask(host, port, allowed)
        for ip in allowed:
            try:
                return socket.create_connection((ip, port), timeout, source_address)
            except OSError as error:
                failure = error
        raise failure or OSError(f"{host} has no address")

    return connect


def _is_led_away(request: urllib.request.Request, first: str) -> bool:
    """Whether a request goes, by itself, to where only a redirect has sent it."""
    return not request.has_proxy() and not same_server(request.full_url, first)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, url: str, egress: EgressPolicy, ask: Ask) -> None:
        super().__init__()
        self._first = url
        self._connect, self._connect_first = _connector(egress, ask), _connector(None, ask)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        connect = self._connect if _is_led_away(req, self._first) else self._connect_first
        return self.do_open(functools.partial(_Judged, connect), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, url: str, egress: EgressPolicy, ask: Ask) -> None:
        super().__init__()
        self._first = url
        self._connect, self._connect_first = _connector(egress, ask), _connector(None, ask)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        tunnelled = getattr(req, "_tunnel_host", None) is not None
        connect = self._connect_first if tunnelled or not _is_led_away(req, self._first) else self._connect
        return self.do_open(functools.partial(_JudgedTls, connect), req)


class _Judged(http.client.HTTPConnection):
    def __init__(self, connect: Callable[..., socket.socket], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._create_connection = connect


class _JudgedTls(http.client.HTTPSConnection):
    def __init__(self, connect: Callable[..., socket.socket], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._create_connection = connect

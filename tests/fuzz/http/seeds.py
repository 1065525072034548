"""Seeds for the fuzzer, from the corpus of the tests: ``python -m tests.fuzz.http.seeds`` adds them to its corpora."""

from __future__ import annotations

from pathlib import Path

from tests.http.corpus import BODIES, BROKEN, REQUESTS, RESPONSES

from ..corpus import read_corpus, write_corpus

__all__ = ["seeds"]

_GOOD_REQUESTS = (
    b"GET http://a.test/x?y HTTP/1.1\r\nHost: a.test\r\nAccept: */*\r\n\r\nGET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: 1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\nhello" * 2,
    b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\nProxy-Authorization: Basic eA==\r\n\r\n\x16\x03\x01",
    b"GET / HTTP/1.1\r\nHost: [::1]:80\r\nConnection: upgrade, x\r\nUpgrade: websocket\r\nX: 1\r\n\r\n",
    b"OPTIONS * HTTP/1.0\r\n\r\n",
    b"\r\nPOST http://a.test:/ HTTP/1.1\r\nHost: a.test:\r\nContent-Length: 0005\r\n\r\nhello"
    b"\r\nGET / HTTP/1.1\r\nHost: b\r\n\r\n",
    b'POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n00a;b="c;d"\r\n0123456789\r\n0;f\r\n\r\n',
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5 ;a\r\nhello\r\n0\r\n\r\n",
)
_GOOD_RESPONSES = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: 1\r\n\r\n",
    b"HTTP/1.0 200\r\n\r\nuntil the end",
    b"HTTP/1.1 999 Odd\r\nContent-Length: 02\r\n\r\nok",
    b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nETag: x\r\n\r\n",
)
_H2_FIELDS = (
    b"x\xff1\xfecookie\xffa=1\xfecookie\xffb=2",
    b"content-length\xff5\xfete\xfftrailers\xfeexpect\xff100-continue",
    b":method\xffCONNECT\xfe:authority\xffa.test:443",
    b":method\xffCONNECT\xfe:protocol\xffwebsocket\xfe:scheme\xffhttps\xfe:authority\xffa.test\xfe:path\xff/",
    b"x\xff1\xfdx-trailer\xff1",
)
_PROXY = (
    b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\nGET",
    b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n",
    b"PROXY UNKNOWN\r\n",
    bytes.fromhex("0d0a0d0a000d0a515549540a2111000cc0000201c6336407dc0401bb"),
    bytes.fromhex("0d0a0d0a000d0a515549540a21110015c0000201c6336407dc0401bb0300040000000001000268"),
    bytes.fromhex("0d0a0d0a000d0a515549540a20000000"),
)


def seeds() -> dict[str, list[bytes]]:
    """Return inputs by target."""
    requests = [data for data, _ in (REQUESTS | BODIES).values() if len(data) < 1500]
    responses = [*(data for data, _ in RESPONSES.values()), *BROKEN.values()]
    return {
        "requests": [b"\x03" + data.replace(b"ORIGIN", b"a.test") for data in (*requests, *_GOOD_REQUESTS)],
        "responses": [b"\x03\x00" + data for data in (*responses, *_GOOD_RESPONSES) if len(data) < 1500],
        "h2_requests": [bytes((mode,)) + fields for mode in (2, 6, 10, 0, 38) for fields in _H2_FIELDS],
        "h2_responses": [bytes((mode,)) + fields for mode in (2, 6, 10, 38) for fields in _H2_FIELDS],
        "h2_fields": [bytes((mode,)) + fields for mode in range(4) for fields in _H2_FIELDS],
        "proxy_header": list(_PROXY),
    }


def main() -> None:
    for name, inputs in seeds().items():
        path = Path(__file__).with_name(f"{name}.corpus")
        write_corpus(path, [*read_corpus(path), *inputs])


if __name__ == "__main__":
    main()

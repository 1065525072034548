"""Messages that are malformed, or that two parsers could read in two ways. ``ORIGIN`` is the origin's authority.

REQUESTS: name → (bytes, status of the refusal). None of their bytes may reach an origin.
BODIES: requests whose header section is good and whose body is not: their origin must never see a complete request.
RESPONSES: name → (bytes, request method). The client must get 502 instead, and none of their bytes.
BROKEN: responses whose header section is good and whose body is not: the client must not see a complete response.
"""

from __future__ import annotations

__all__ = ["BODIES", "BROKEN", "REQUESTS", "RESPONSES"]


def _line(line: bytes) -> bytes:
    return line + b"\r\nHost: ORIGIN\r\n\r\n"


def _fields(fields: bytes, method: bytes = b"GET") -> bytes:
    return method + b" http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\n" + fields + b"\r\n\r\n"


def _host(value: bytes) -> bytes:
    return b"GET http://ORIGIN/ HTTP/1.1\r\nHost: " + value + b"\r\n\r\n"


def _target(authority: bytes) -> bytes:
    return b"GET http://" + authority + b"/ HTTP/1.1\r\nHost: a.test\r\n\r\n"


def _connect(line: bytes, fields: bytes = b"") -> bytes:
    return line + b"\r\nHost: ORIGIN\r\n" + fields + b"\r\n"


_REQUEST_LINES: dict[str, tuple[bytes, int]] = {
    "no version": (_line(b"GET http://ORIGIN/"), 400),
    "version 0.9": (_line(b"GET http://ORIGIN/ HTTP/0.9"), 400),
    "version 1.2": (_line(b"GET http://ORIGIN/ HTTP/1.2"), 400),
    "version 2.0": (_line(b"GET http://ORIGIN/ HTTP/2.0"), 400),
    "version 3.0": (_line(b"GET http://ORIGIN/ HTTP/3.0"), 400),
    "version 1": (_line(b"GET http://ORIGIN/ HTTP/1"), 400),
    "version 1.": (_line(b"GET http://ORIGIN/ HTTP/1."), 400),
    "version 1.10": (_line(b"GET http://ORIGIN/ HTTP/1.10"), 400),
    "version 01.1": (_line(b"GET http://ORIGIN/ HTTP/01.1"), 400),
    "version 1.1.1": (_line(b"GET http://ORIGIN/ HTTP/1.1.1"), 400),
    "version in lower case": (_line(b"GET http://ORIGIN/ http/1.1"), 400),
    "version of another protocol": (_line(b"GET http://ORIGIN/ ICAP/1.1"), 400),
    "version with a blank": (_line(b"GET http://ORIGIN/ HTTP/ 1.1"), 400),
    "version with a comma": (_line(b"GET http://ORIGIN/ HTTP/1,1"), 400),
    "version with a sign": (_line(b"GET http://ORIGIN/ HTTP/+1.1"), 400),
    "version twice": (_line(b"GET http://ORIGIN/ HTTP/1.1 HTTP/1.1"), 400),
    "two blanks before the target": (_line(b"GET  http://ORIGIN/ HTTP/1.1"), 400),
    "two blanks behind the target": (_line(b"GET http://ORIGIN/  HTTP/1.1"), 400),
    "blank at the end": (_line(b"GET http://ORIGIN/ HTTP/1.1 "), 400),
    "tab for a blank": (_line(b"GET\thttp://ORIGIN/ HTTP/1.1"), 400),
    "tab behind the target": (_line(b"GET http://ORIGIN/\tHTTP/1.1"), 400),
    "vertical tab for a blank": (_line(b"GET\x0bhttp://ORIGIN/ HTTP/1.1"), 400),
    "form feed in the target": (_line(b"GET http://ORIGIN/\x0cx HTTP/1.1"), 400),
    "bare CR for a blank": (_line(b"GET\rhttp://ORIGIN/ HTTP/1.1"), 400),
    "blank before the method": (_line(b" GET http://ORIGIN/ HTTP/1.1"), 400),
    "no method": (_line(b"http://ORIGIN/ HTTP/1.1"), 400),
    "empty method": (_line(b" http://ORIGIN/ HTTP/1.1"), 400),
    "method with a colon": (_line(b"GET: http://ORIGIN/ HTTP/1.1"), 400),
    "method with a slash": (_line(b"G/T http://ORIGIN/ HTTP/1.1"), 400),
    "method in brackets": (_line(b"(GET) http://ORIGIN/ HTTP/1.1"), 400),
    "method with a high octet": (_line(b"G\xcbT http://ORIGIN/ HTTP/1.1"), 400),
    "method in lower case": (_line(b"get http://ORIGIN/ HTTP/1.1"), 400),
    "method head in mixed case": (_line(b"Head http://ORIGIN/ HTTP/1.1"), 400),
    "method connect in lower case": (_line(b"connect ORIGIN HTTP/1.1"), 400),
    "endless method": (_line(b"G" * 4000 + b" http://ORIGIN/ HTTP/1.1"), 400),
    "long method": (_line(b"G" * 33 + b" http://ORIGIN/ HTTP/1.1"), 400),
    "no target": (_line(b"GET HTTP/1.1"), 400),
    "blank in the target": (_line(b"GET http://ORIGIN/a b HTTP/1.1"), 400),
    "fragment": (_line(b"GET http://ORIGIN/#top HTTP/1.1"), 400),
    "fragment in the query": (_line(b"GET http://ORIGIN/?a#b HTTP/1.1"), 400),
    "fragment in the authority": (_line(b"GET http://ORIGIN#b/ HTTP/1.1"), 400),
    "fragment in origin form": (_line(b"GET /#b HTTP/1.1"), 400),
    "NUL in the target": (_line(b"GET http://ORIGIN/\0 HTTP/1.1"), 400),
    "DEL in the target": (_line(b"GET http://ORIGIN/\x7f HTTP/1.1"), 400),
    "high octet in the target": (_line(b"GET http://ORIGIN/\xe9 HTTP/1.1"), 400),
    "UTF-8 in the target": (_line("GET http://ORIGIN/é HTTP/1.1".encode()), 400),
    "backslash in the path": (_line(b"GET http://ORIGIN/a\\..\\b HTTP/1.1"), 400),
    "broken escape in the path": (_line(b"GET http://ORIGIN/%zz HTTP/1.1"), 400),
    "short escape in the path": (_line(b"GET http://ORIGIN/% HTTP/1.1"), 400),
    "asterisk for GET": (_line(b"GET * HTTP/1.1"), 400),
    "authority for GET": (_line(b"GET ORIGIN HTTP/1.1"), 400),
    "relative path": (_line(b"GET index.html HTTP/1.1"), 400),
    "scheme without authority": (_line(b"GET http:/index.html HTTP/1.1"), 400),
    "scheme with one slash": (_line(b"GET http:/ORIGIN/ HTTP/1.1"), 400),
    "no scheme": (_line(b"GET ://ORIGIN/ HTTP/1.1"), 400),
    "scheme with a blank escape": (_line(b"GET ht%74p://ORIGIN/ HTTP/1.1"), 400),
    "two empty lines first": (b"\r\n\r\n" + _line(b"GET http://ORIGIN/ HTTP/1.1"), 400),
    "LF first": (b"\n" + _line(b"GET http://ORIGIN/ HTTP/1.1"), 400),
    "CR first": (b"\r" + _line(b"GET http://ORIGIN/ HTTP/1.1"), 400),
    "byte order mark first": (b"\xef\xbb\xbf" + _line(b"GET http://ORIGIN/ HTTP/1.1"), 400),
    "TLS ClientHello": (bytes.fromhex("16030100a5010000a10303") + bytes(160), 400),
    "SOCKS5 greeting": (b"\x05\x01\x00", 400),
    "h2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a response": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 400),
}

_FIELD_LINES: dict[str, tuple[bytes, int]] = {
    "bare LF ends the request line": (b"GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\r\n\r\n", 400),
    "bare LF ends a field": (b"GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\nX: 1\r\n\r\n", 400),
    "bare LF ends the section": (b"GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\n\n", 400),
    "bare LFs end all": (b"GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n", 400),
    "bare CR ends a field": (_fields(b"X: 1\rY: 2"), 400),
    "CR in a value": (_fields(b"X: a\rb"), 400),
    "CR CR LF": (b"GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\r\n\r\n", 400),
    "LF CR": (b"GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\n\r\n\r", 400),
    "folded with a blank": (_fields(b"X: a\r\n b"), 400),
    "folded with a tab": (_fields(b"X: a\r\n\tb"), 400),
    "folded first line": (b"GET http://ORIGIN/ HTTP/1.1\r\n Host: ORIGIN\r\n\r\n", 400),
    "folded Transfer-Encoding": (_fields(b"Transfer-Encoding:\r\n chunked", b"POST"), 400),
    "fold of blanks only": (_fields(b"X: a\r\n  "), 400),
    "folded Host": (b"GET http://ORIGIN/ HTTP/1.1\r\nHost:\r\n ORIGIN\r\n\r\n", 400),
    "blank before the colon": (_fields(b"X : 1"), 400),
    "tab before the colon": (_fields(b"X\t: 1"), 400),
    "blank before the colon of Content-Length": (_fields(b"Content-Length : 5", b"POST"), 400),
    "blank before the colon of Transfer-Encoding": (_fields(b"Transfer-Encoding : chunked", b"POST"), 400),
    "no colon": (_fields(b"Xvalue"), 400),
    "no name": (_fields(b": value"), 400),
    "blank in a name": (_fields(b"X Y: 1"), 400),
    "NUL in a name": (_fields(b"X\0: 1"), 400),
    "NUL in a value": (_fields(b"X: a\0b"), 400),
    "SOH in a value": (_fields(b"X: a\x01b"), 400),
    "backspace in a value": (_fields(b"X: a\x08b"), 400),
    "vertical tab in a value": (_fields(b"X: a\x0bb"), 400),
    "form feed in a value": (_fields(b"X: a\x0cb"), 400),
    "escape in a value": (_fields(b"X: \x1b[2J"), 400),
    "DEL in a value": (_fields(b"X: a\x7f"), 400),
    "high octet in a name": (_fields(b"X\xe9: 1"), 400),
    "brackets in a name": (_fields(b"X[0]: 1"), 400),
    "quote in a name": (_fields(b'"X": 1'), 400),
    "slash in a name": (_fields(b"X/Y: 1"), 400),
    "at sign in a name": (_fields(b"X@Y: 1"), 400),
    "semicolon in a name": (_fields(b"X;Y: 1"), 400),
    "underscore for a hyphen in Content_Length": (_fields(b"Content_Length: 5", b"POST"), 400),
    "underscore for a hyphen in Transfer_Encoding": (_fields(b"Transfer_Encoding: chunked", b"POST"), 400),
    "underscore for a hyphen in X_Forwarded_For": (_fields(b"X_Forwarded_For: 127.0.0.1"), 400),
    "underscore for a hyphen in Proxy_Authorization": (_fields(b"Proxy_Authorization: Basic eA=="), 400),
    "Connection names Content-Length": (
        _fields(b"Connection: Content-Length\r\nContent-Length: 1", b"POST") + b"x",
        400,
    ),
    "Connection names Host": (_fields(b"Connection: close, host"), 400),
    "Connection names Transfer-Encoding": (_fields(b"Connection: transfer-encoding"), 400),
    "Connection with no token": (_fields(b"Connection: a b"), 400),
    "unknown expectation": (_fields(b"Expect: 200-ok", b"PUT"), 417),
    "two expectations": (_fields(b"Expect: 100-continue, x", b"PUT"), 417),
    "too many fields": (_fields(b"\r\n".join(b"X: %d" % n for n in range(200))), 431),
    "100 KiB in one field": (_fields(b"X: " + b"a" * 102400), 431),
    "100 KiB in many fields": (_fields(b"\r\n".join(b"X: " + b"a" * 1000 for _ in range(103))), 431),
    "a name of 100 KiB": (_fields(b"X" * 102400 + b": 1"), 431),
    "a target of 1 MB": (_line(b"GET http://ORIGIN/" + b"a" * 1_000_000 + b" HTTP/1.1"), 414),
    "a target just too long": (_line(b"GET http://ORIGIN/" + b"a" * 16384 + b" HTTP/1.1"), 414),
    "an endless target": (b"GET http://ORIGIN/" + b"a" * 50_000, 414),
}

_AUTHORITIES: dict[str, tuple[bytes, int]] = {
    "no Host": (b"GET http://ORIGIN/ HTTP/1.1\r\n\r\n", 400),
    "no Host in origin form": (b"GET / HTTP/1.1\r\nX: 1\r\n\r\n", 400),
    "two Hosts": (_fields(b"Host: b.test"), 400),
    "two equal Hosts": (_fields(b"Host: ORIGIN"), 400),
    "two Hosts in HTTP/1.0": (b"GET http://ORIGIN/ HTTP/1.0\r\nHost: ORIGIN\r\nHost: b.test\r\n\r\n", 400),
    "empty Host": (_host(b""), 400),
    "Host with a blank": (_host(b"a b"), 400),
    "Host with a list": (_host(b"a.test, b.test"), 400),
    "Host with a path": (_host(b"a.test/x"), 400),
    "Host with a scheme": (_host(b"http://a.test"), 400),
    "Host with user information": (_host(b"u@a.test"), 400),
    "Host with a bad port": (_host(b"a.test:x"), 400),
    "Host with two ports": (_host(b"a.test:1:2"), 400),
    "Host with a port too high": (_host(b"a.test:65536"), 400),
    "Host with a high octet": (_host(b"\xe4.test"), 400),
    "Host with a quote": (_host(b'"a.test"'), 400),
    "Host with an escape": (_host(b"%61.test"), 400),
    "Host with a backslash": (_host(b"a.test\\b"), 400),
    "user information": (_target(b"user:pass@a.test"), 400),
    "user information with an at sign": (_target(b"a.test@b.test@c.test"), 400),
    "empty authority": (_target(b""), 400),
    "port only": (_target(b":80"), 400),
    "port 0": (_target(b"a.test:0"), 400),
    "port with a leading zero": (_target(b"a.test:080"), 400),
    "port with a sign": (_target(b"a.test:+80"), 400),
    "port of six digits": (_target(b"a.test:100080"), 400),
    "port too high": (_target(b"a.test:65536"), 400),
    "port in words": (_target(b"a.test:http"), 400),
    "short IPv4 address": (_target(b"127.1"), 400),
    "one number": (_target(b"2130706433"), 400),
    "hexadecimal IPv4 address": (_target(b"0x7f.0.0.1"), 400),
    "hexadecimal number": (_target(b"0x7f000001"), 400),
    "octal IPv4 address": (_target(b"0177.0.0.1"), 400),
    "IPv4 address with a leading zero": (_target(b"127.0.0.01"), 400),
    "IPv4 address with five parts": (_target(b"1.2.3.4.5"), 400),
    "IPv4 address above 255": (_target(b"127.0.0.256"), 400),
    "IPv4 address with a dot behind": (_target(b"127.0.0.1."), 400),
    "IPv6 address without brackets": (_target(b"::1"), 400),
    "IPv6 address with a zone": (_target(b"[fe80::1%25eth0]"), 400),
    "IPv6 address with a raw zone": (_target(b"[fe80::1%eth0]"), 400),
    "future IP literal": (_target(b"[v1.x]"), 400),
    "bracket not closed": (_target(b"[::1"), 400),
    "bracket not opened": (_target(b"::1]"), 400),
    "junk behind the bracket": (_target(b"[::1]x"), 400),
    "IPv6 address too long": (_target(b"[1:2:3:4:5:6:7:8:9]"), 400),
    "name in brackets": (_target(b"[a.test]"), 400),
    "empty label": (_target(b"a..test"), 400),
    "leading dot": (_target(b".a.test"), 400),
    "only a dot": (_target(b"."), 400),
    "label of 64 octets": (_target(b"a" * 64 + b".test"), 400),
    "name of 254 octets": (_target(b".".join([b"a" * 49] * 5) + b".aaaa"), 400),
    "label ends in a hyphen": (_target(b"a-.test"), 400),
    "escape in the host": (_target(b"a%2etest"), 400),
    "NUL escape in the host": (_target(b"a.test%00.b.test"), 400),
    "backslash in the authority": (_target(b"a.test\\b.test"), 400),
    "query for a host": (_line(b"GET http://?a HTTP/1.1"), 400),
    "semicolon in the host": (_target(b"a;b.test"), 400),
    "asterisk in the host": (_target(b"*.test"), 400),
    "UTF-8 in the host": (_target("bücher.test".encode()), 400),
}

_LENGTHS: dict[str, tuple[bytes, int]] = {
    name: (_fields(fields, b"POST") + b"hello", 400)
    for name, fields in {
        "Content-Length and Transfer-Encoding": b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding and Content-Length": b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length 0 and Transfer-Encoding": b"Content-Length: 0\r\nTransfer-Encoding: chunked",
        "two lengths": b"Content-Length: 5\r\nContent-Length: 6",
        "two equal lengths": b"Content-Length: 5\r\nContent-Length: 5",
        "a list of equal lengths": b"Content-Length: 5, 5",
        "a list of lengths": b"Content-Length: 5, 6",
        "empty length": b"Content-Length:",
        "length with a plus": b"Content-Length: +5",
        "length with a minus": b"Content-Length: -5",
        "length -0": b"Content-Length: -0",
        "hexadecimal length": b"Content-Length: 0x5",
        "length with a fraction": b"Content-Length: 5.0",
        "length with an exponent": b"Content-Length: 5e0",
        "length with a blank inside": b"Content-Length: 5 5",
        "length with a letter": b"Content-Length: 5a",
        "length with an underscore": b"Content-Length: 5_0",
        "length with a comma": b"Content-Length: 5,",
        "length in quotes": b'Content-Length: "5"',
        "length beyond 64 bits": b"Content-Length: 18446744073709551621",
        "length beyond 128 bits": b"Content-Length: " + b"9" * 40,
        "length in other digits": b"Content-Length: \xd9\xa5",
        "length in superscript": b"Content-Length: \xb2",
        "length and a second of another case": b"Content-Length: 5\r\ncontent-length: 6",
    }.items()
}

_CODINGS: dict[str, tuple[bytes, int]] = {
    name: (_fields(b"Transfer-Encoding:" + value, b"POST") + b"5\r\nhello\r\n0\r\n\r\n", status)
    for name, (value, status) in {
        "identity": (b" identity", 400),
        "chunked, identity": (b" chunked, identity", 400),
        "identity, chunked": (b" identity, chunked", 400),
        "chunked twice": (b" chunked, chunked", 400),
        "xchunked": (b" xchunked", 400),
        "chunked behind x": (b" x chunked", 400),
        "chunked with a parameter": (b" chunked;q=1", 400),
        "chunked in quotes": (b' "chunked"', 400),
        "chunked in single quotes": (b" 'chunked'", 400),
        "chunked with a comma": (b" chunked,", 400),
        "comma before chunked": (b" ,chunked", 400),
        "empty coding": (b"", 400),
        "chunked with a dash": (b" chunked-", 400),
        "chunk": (b" chunk", 400),
        "gzip only": (b" gzip", 400),
        "gzip, chunked": (b" gzip, chunked", 501),
        "deflate, chunked": (b" deflate,chunked", 501),
        "chunked, gzip": (b" chunked, gzip", 400),
        "unknown, chunked": (b" cow, chunked", 400),
        "two fields": (b" chunked\r\nTransfer-Encoding: chunked", 400),
        "a second field identity": (b" chunked\r\nTransfer-Encoding: identity", 400),
        "a second field of another case": (b" chunked\r\ntransfer-encoding: cow", 400),
        "vertical tab before": (b" \x0bchunked", 400),
        "vertical tab behind": (b" chunked\x0b", 400),
        "high octet behind": (b" chunked\xa0", 400),
        "Kelvin sign": (b" chun\xe2\x84\xaaed", 400),
        "null": (b" null", 400),
    }.items()
} | {
    "chunked in HTTP/1.0": (
        b"POST http://ORIGIN/ HTTP/1.0\r\nHost: ORIGIN\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        400,
    ),
    "chunked TRACE": (_fields(b"Transfer-Encoding: chunked", b"TRACE") + b"0\r\n\r\n", 400),
    "TRACE with a length": (_fields(b"Content-Length: 1", b"TRACE") + b"x", 400),
}

_CONNECTS: dict[str, tuple[bytes, int]] = {
    "without a port": (_connect(b"CONNECT a.test HTTP/1.1"), 400),
    "with an empty port": (_connect(b"CONNECT a.test: HTTP/1.1"), 400),
    "with port 0": (_connect(b"CONNECT a.test:0 HTTP/1.1"), 400),
    "with a port too high": (_connect(b"CONNECT a.test:65536 HTTP/1.1"), 400),
    "with a name for a port": (_connect(b"CONNECT a.test:https HTTP/1.1"), 400),
    "in origin form": (_connect(b"CONNECT / HTTP/1.1"), 400),
    "in absolute form": (_connect(b"CONNECT http://ORIGIN/ HTTP/1.1"), 400),
    "with a path": (_connect(b"CONNECT ORIGIN/ HTTP/1.1"), 400),
    "with an asterisk": (_connect(b"CONNECT * HTTP/1.1"), 400),
    "with user information": (_connect(b"CONNECT u@a.test:443 HTTP/1.1"), 400),
    "with a fragment": (_connect(b"CONNECT ORIGIN#x HTTP/1.1"), 400),
    "with a query": (_connect(b"CONNECT ORIGIN?x HTTP/1.1"), 400),
    "with an IPv6 address without brackets": (_connect(b"CONNECT ::1:443 HTTP/1.1"), 400),
    "with a short IPv4 address": (_connect(b"CONNECT 127.1:443 HTTP/1.1"), 400),
    "with two targets": (_connect(b"CONNECT ORIGIN ORIGIN HTTP/1.1"), 400),
    "with a body by length": (_connect(b"CONNECT ORIGIN HTTP/1.1", b"Content-Length: 5\r\n") + b"hello", 400),
    "with a chunked body": (
        _connect(b"CONNECT ORIGIN HTTP/1.1", b"Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n",
        400,
    ),
    "without a Host": (b"CONNECT ORIGIN HTTP/1.1\r\n\r\n", 400),
    "with two Hosts": (_connect(b"CONNECT ORIGIN HTTP/1.1", b"Host: b.test\r\n"), 400),
}

_ENDS_EARLY: dict[str, tuple[bytes, int]] = {
    name: (data, 400)
    for name, data in {
        "in the method": b"GE",
        "in the target": b"GET http://ORIGIN/",
        "behind the request line": b"GET http://ORIGIN/ HTTP/1.1\r\n",
        "in a field": b"GET http://ORIGIN/ HTTP/1.1\r\nHos",
        "before the empty line": b"GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\n",
        "within the empty line": b"GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\n\r",
    }.items()
}


def _merged(**groups: dict[str, tuple[bytes, int]]) -> dict[str, tuple[bytes, int]]:
    return {f"{group}: {name}": value for group, values in groups.items() for name, value in values.items()}


REQUESTS: dict[str, tuple[bytes, int]] = _merged(
    line=_REQUEST_LINES,
    field=_FIELD_LINES,
    authority=_AUTHORITIES,
    length=_LENGTHS,
    coding=_CODINGS,
    connect=_CONNECTS,
    end=_ENDS_EARLY,
)

_CHUNKS: dict[str, bytes] = {
    "size without digits": b"\r\nhello\r\n0\r\n\r\n",
    "size in words": b"five\r\nhello\r\n0\r\n\r\n",
    "size with a prefix": b"0x5\r\nhello\r\n0\r\n\r\n",
    "size with a sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "negative size": b"-5\r\nhello\r\n0\r\n\r\n",
    "size with a blank before": b" 5\r\nhello\r\n0\r\n\r\n",
    "size with a blank behind": b"5 \r\nhello\r\n0\r\n\r\n",
    "size with a tab behind": b"5\t\r\nhello\r\n0\r\n\r\n",
    "size with an underscore": b"0_5\r\nhello\r\n0\r\n\r\n",
    "size beyond 64 bits": b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "size of many zeros": b"0" * 100 + b"5\r\nhello\r\n0\r\n\r\n",
    "size ends with LF": b"5\nhello\r\n0\r\n\r\n",
    "size ends with CR": b"5\rhello\r\n0\r\n\r\n",
    "size ends with CR CR LF": b"5\r\r\nhello\r\n0\r\n\r\n",
    "data ends with LF": b"5\r\nhello\n0\r\n\r\n",
    "data ends with CR": b"5\r\nhello\r0\r\n\r\n",
    "data too long": b"5\r\nhello!\r\n0\r\n\r\n",
    "data too short": b"6\r\nhello\r\n0\r\n\r\n",
    "data ends with nothing": b"5\r\nhello0\r\n\r\n",
    "extension with a bare LF": b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "extension with a bare CR": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "extension with NUL": b"5;a\0\r\nhello\r\n0\r\n\r\n",
    "extension without a name": b"5;\r\nhello\r\n0\r\n\r\n",
    "extension with an open quote": b'5;a="\r\nhello\r\n0\r\n\r\n',
    "extension without a semicolon": b"5 a\r\nhello\r\n0\r\n\r\n",
    "extension of 1 KiB": b"5;" + b"a" * 1024 + b"\r\nhello\r\n0\r\n\r\n",
    "endless extension": b"5;" + b"a" * 100_000,
    "last chunk ends with LF": b"5\r\nhello\r\n0\n\r\n",
    "empty line is LF": b"5\r\nhello\r\n0\r\n\n",
    "trailer with a bare LF": b"5\r\nhello\r\n0\r\nX: 1\nY: 2\r\n\r\n",
    "trailer without a colon": b"5\r\nhello\r\n0\r\nX\r\n\r\n",
    "trailer with a blank before the colon": b"5\r\nhello\r\n0\r\nX : 1\r\n\r\n",
    "folded trailer": b"5\r\nhello\r\n0\r\nX: 1\r\n 2\r\n\r\n",
    "trailer with NUL": b"5\r\nhello\r\n0\r\nX: \0\r\n\r\n",
    "Content-Length in the trailer": b"5\r\nhello\r\n0\r\nContent-Length: 1\r\n\r\n",
    "Transfer-Encoding in the trailer": b"5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "Host in the trailer": b"5\r\nhello\r\n0\r\nHost: b.test\r\n\r\n",
    "Authorization in the trailer": b"5\r\nhello\r\n0\r\nAuthorization: Basic eA==\r\n\r\n",
    "trailers of 100 KiB": b"5\r\nhello\r\n0\r\n" + (b"X: " + b"a" * 1000 + b"\r\n") * 100 + b"\r\n",
    "a request for a chunk": b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
}

BODIES: dict[str, tuple[bytes, int]] = {
    f"chunk: {name}": (
        b"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nTransfer-Encoding: chunked\r\n\r\n" + body,
        431 if name == "trailers of 100 KiB" else 400,
    )
    for name, body in _CHUNKS.items()
} | {
    "end: in a body by length": (b"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nContent-Length: 5\r\n\r\nhel", 400),
    "end: in a chunk": (
        b"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        400,
    ),
    "end: before the last chunk": (
        b"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        400,
    ),
    "end: before the trailer's end": (
        b"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
        400,
    ),
}


def _status(line: bytes) -> bytes:
    return line + b"\r\nContent-Length: 2\r\n\r\nok"


def _response(fields: bytes, body: bytes = b"ok") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\n" + body


RESPONSES: dict[str, tuple[bytes, bytes]] = {
    name: (data, b"GET")
    for name, data in {
        "no status line": b"ok\r\n\r\n",
        "HTTP/0.9": b"<html>ok</html>",
        "another protocol": b"220 smtp.test ESMTP\r\n\r\n",
        "SSH": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "ICY": _status(b"ICY 200 OK"),
        "version 2.0": _status(b"HTTP/2.0 200 OK"),
        "version 1.2": _status(b"HTTP/1.2 200 OK"),
        "version 0.9": _status(b"HTTP/0.9 200 OK"),
        "version in lower case": _status(b"http/1.1 200 OK"),
        "two blanks": _status(b"HTTP/1.1  200 OK"),
        "tab for a blank": _status(b"HTTP/1.1\t200 OK"),
        "no status": _status(b"HTTP/1.1 OK"),
        "status of two digits": _status(b"HTTP/1.1 20 OK"),
        "status of four digits": _status(b"HTTP/1.1 2000 OK"),
        "status 000": _status(b"HTTP/1.1 000 OK"),
        "status 099": _status(b"HTTP/1.1 099 OK"),
        "negative status": _status(b"HTTP/1.1 -200 OK"),
        "hexadecimal status": _status(b"HTTP/1.1 0xc8 OK"),
        "status with a fraction": _status(b"HTTP/1.1 200.1 OK"),
        "NUL in the reason": _status(b"HTTP/1.1 200 O\0K"),
        "bare CR in the reason": _status(b"HTTP/1.1 200 O\rK"),
        "escape in the reason": _status(b"HTTP/1.1 200 \x1b[2J"),
        "empty line first": b"\r\n" + _status(b"HTTP/1.1 200 OK"),
        "blank first": b" " + _status(b"HTTP/1.1 200 OK"),
        "bare LFs": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        "bare LF ends a field": _response(b"X: 1\nContent-Length: 2"),
        "bare CR ends a field": _response(b"X: 1\rContent-Length: 2"),
        "folded field": _response(b"X: 1\r\n 2\r\nContent-Length: 2"),
        "folded Content-Length": _response(b"Content-Length:\r\n 2"),
        "blank before the colon": _response(b"Content-Length : 2"),
        "no colon": _response(b"X\r\nContent-Length: 2"),
        "no name": _response(b": x\r\nContent-Length: 2"),
        "NUL in a value": _response(b"X: \0\r\nContent-Length: 2"),
        "control character in a value": _response(b"X: \x01\r\nContent-Length: 2"),
        "high octet in a name": _response(b"X\xe9: 1\r\nContent-Length: 2"),
        "Content_Length": _response(b"Content_Length: 2\r\nContent-Length: 2"),
        "Content-Length and Transfer-Encoding": _response(
            b"Content-Length: 2\r\nTransfer-Encoding: chunked", b"2\r\nok\r\n0\r\n\r\n"
        ),
        "two lengths": _response(b"Content-Length: 2\r\nContent-Length: 3"),
        "two equal lengths": _response(b"Content-Length: 2\r\nContent-Length: 2"),
        "list of lengths": _response(b"Content-Length: 2, 2"),
        "negative length": _response(b"Content-Length: -2"),
        "length with a plus": _response(b"Content-Length: +2"),
        "hexadecimal length": _response(b"Content-Length: 0x2"),
        "empty length": _response(b"Content-Length:"),
        "length beyond 64 bits": _response(b"Content-Length: 18446744073709551618"),
        "coding gzip, chunked": _response(b"Transfer-Encoding: gzip, chunked", b"2\r\nok\r\n0\r\n\r\n"),
        "coding identity": _response(b"Transfer-Encoding: identity"),
        "coding chunked, identity": _response(b"Transfer-Encoding: chunked, identity", b"2\r\nok\r\n0\r\n\r\n"),
        "coding xchunked": _response(b"Transfer-Encoding: xchunked", b"2\r\nok\r\n0\r\n\r\n"),
        "coding chunked twice": _response(b"Transfer-Encoding: chunked, chunked", b"2\r\nok\r\n0\r\n\r\n"),
        "two coding fields": _response(
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"2\r\nok\r\n0\r\n\r\n"
        ),
        "coding in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        "204 with a length": b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok",
        "204 with two codings": b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
        "103 with a length": b"HTTP/1.1 103 Early Hints\r\nContent-Length: 2\r\n\r\nok",
        "103 with a coding": b"HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: chunked\r\n\r\n",
        "101 unasked": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        "endless interim responses": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100 + _status(b"HTTP/1.1 200 OK"),
        "Connection names Content-Length": _response(b"Connection: Content-Length\r\nContent-Length: 2"),
        "100 KiB of fields": _response(b"X: " + b"a" * 102400 + b"\r\nContent-Length: 2"),
        "too many fields": _response(b"\r\n".join(b"X: %d" % n for n in range(200)) + b"\r\nContent-Length: 2"),
        "cut off in the status line": b"HTTP/1.1 200",
        "cut off in a field": b"HTTP/1.1 200 OK\r\nContent-Le",
        "cut off before the empty line": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n",
        "nothing": b"",
    }.items()
}

BROKEN: dict[str, bytes] = {
    f"chunk: {name}": _response(b"Transfer-Encoding: chunked", body) for name, body in _CHUNKS.items()
} | {
    "cut off in a body by length": _response(b"Content-Length: 5", b"hel"),
    "cut off in a chunk": _response(b"Transfer-Encoding: chunked", b"5\r\nhel"),
    "cut off before the last chunk": _response(b"Transfer-Encoding: chunked", b"5\r\nhello\r\n"),
    "cut off before the trailer's end": _response(b"Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n"),
}

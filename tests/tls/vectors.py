"""Published fingerprints, and the fields of the ClientHellos that they are of.

The facts are those of FoxIO-LLC/ja4 (commit 0e54bc8): ``pcap/<source>`` and ``python/test/testdata/<source>.json``;
the JA3 of each is what TShark 4.0.17 computes of the same packet. The ClientHellos are built anew from the fields by
:func:`tests.tls.hello.build`; what no fingerprint looks at (random, key shares, padding) is not kept.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["VECTORS", "Vector"]


@dataclass(frozen=True)
class Vector:
    """Numbers are hex words in the order of the packet, GREASE included."""

    source: str
    ja4: str
    ja3: str
    server_name: str | None
    legacy_version: int
    cipher_suites: str
    extensions: str
    alpn: tuple[bytes, ...]
    versions: str
    groups: str
    point_formats: bytes
    signature_algorithms: str


VECTORS = (
    Vector(
        source="badcurveball.pcap, TCP stream 0",
        ja4="t13d1615h2_46e7e9700bed_45f260be83e2",
        ja3="66918128f1b9b03303d77c6f2eefd128",
        server_name="bad.curveballtest.com",
        legacy_version=0x0303,
        cipher_suites="aaaa 1301 1302 1303 c02b c02f c02c c030 cca9 cca8 c013 c014 009c 009d 002f 0035 000a",
        extensions="4a4a 0000 0017 ff01 000a 000b 0023 0010 0005 000d 0012 0033 002d 002b 001b 7a7a 0015",
        alpn=(
            b"h2",
            b"http/1.1",
        ),
        versions="2a2a 0304 0303 0302 0301",
        groups="caca 001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0403 0804 0401 0503 0805 0501 0806 0601 0201",
    ),
    Vector(
        source="browsers-x509.pcapng, TCP stream 0",
        ja4="t13d1516h2_8daaf6152771_e5627efa2ab1",
        ja3="34fcb8e0ef812f18e760b52314a54fd0",
        server_name="edge.microsoft.com",
        legacy_version=0x0303,
        cipher_suites="aaaa 1301 1302 1303 c02b c02f c02c c030 cca9 cca8 c013 c014 009c 009d 002f 0035",
        extensions="6a6a 000d 0000 000a 0005 000b 002b 001b ff01 0033 4469 002d 0023 0017 0012 0010 0a0a 0015",
        alpn=(
            b"h2",
            b"http/1.1",
        ),
        versions="9a9a 0304 0303",
        groups="4a4a 001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0403 0804 0401 0503 0805 0501 0806 0601",
    ),
    Vector(
        source="https3-301-get.pcap, TCP stream 0",
        ja4="t10d230100_6a57a6f57151_000000000000",
        ja3="06a92bf69b367389d2feb0d70501ddfe",
        server_name="www.github.com",
        legacy_version=0x0301,
        cipher_suites=(
            "0039 0038 0035 0016 0013 000a 0033 0032 002f 009a 0099 0096 0005 0004 0015 0012 0009 0014 0011 0008 "
            "0006 0003 00ff"
        ),
        extensions="0000",
        alpn=(),
        versions="",
        groups="",
        point_formats=b"",
        signature_algorithms="",
    ),
    Vector(
        source="ipv6.pcapng, TCP stream 0",
        ja4="t12d4605h2_85626a9a5f7f_aaf95bb78ec9",
        ja3="3faa4ad39f690c4ef1c3160caa375465",
        server_name="www.cloudflare.com",
        legacy_version=0x0303,
        cipher_suites=(
            "c030 c02c c028 c024 c014 c00a 009f 006b 0039 cca9 cca8 ccaa ff85 00c4 0088 0081 009d 003d 0035 00c0 "
            "0084 c02f c02b c027 c023 c013 c009 009e 0067 0033 00be 0045 009c 003c 002f 00ba 0041 c011 c007 0005 "
            "0004 c012 c008 0016 000a 00ff"
        ),
        extensions="0000 000b 000a 000d 0010",
        alpn=(
            b"h2",
            b"http/1.1",
        ),
        versions="",
        groups="001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0601 0603 efef 0501 0503 0401 0403 eeee eded 0301 0303 0201 0203",
    ),
    Vector(
        source="latest.pcapng, TCP stream 3",
        ja4="t12d190800_d83cc789557e_7af1ed941c26",
        ja3="a0e9f5d64349fb13191bc781f81f42e1",
        server_name="discovery.cem.cloud.us",
        legacy_version=0x0303,
        cipher_suites="c02c c02b c030 c02f c024 c023 c028 c027 c00a c009 c014 c013 009d 009c 003d 003c 0035 002f 000a",
        extensions="0000 0005 000a 000b 000d 0023 0017 ff01",
        alpn=(),
        versions="",
        groups="001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0804 0805 0806 0401 0501 0201 0403 0503 0203 0202 0601 0603",
    ),
    Vector(
        source="latest.pcapng, TCP stream 5",
        ja4="t13d1516h2_8daaf6152771_9b887d9acb53",
        ja3="d81fcba3f82df97ae9971d938da5caa6",
        server_name="app.slack.com",
        legacy_version=0x0303,
        cipher_suites="0a0a 1301 1302 1303 c02b c02f c02c c030 cca9 cca8 c013 c014 009c 009d 002f 0035",
        extensions="5a5a 000d 0010 0000 000b 0023 4469 ff01 0033 000a 002d 002b 0005 0017 0012 001b 6a6a 0029",
        alpn=(
            b"h2",
            b"http/1.1",
        ),
        versions="6a6a 0304 0303",
        groups="baba 001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0403 0804 0401 0503 0805 0501 0806 0601",
    ),
    Vector(
        source="macos_tcp_flags.pcap, TCP stream 0",
        ja4="t13d2613h2_2802a3db6c62_845d286b0d67",
        ja3="6fa3244afc6bb6f9fad207b6b52af26b",
        server_name="venarisecurity.com",
        legacy_version=0x0303,
        cipher_suites=(
            "1301 1302 1303 c02c c02b c024 c023 c00a c009 cca9 c030 c02f c028 c027 c014 c013 cca8 009d 009c 003d "
            "003c 0035 002f c008 c012 000a"
        ),
        extensions="ff01 0000 0017 000d 0005 0012 0010 000b 0033 002d 002b 000a 0015",
        alpn=(
            b"h2",
            b"http/1.1",
        ),
        versions="0304 0303 0302 0301",
        groups="001d 0017 0018 0019",
        point_formats=b"\x00",
        signature_algorithms="0403 0804 0401 0503 0203 0805 0805 0501 0806 0601 0201",
    ),
    Vector(
        source="ssh2.pcapng, TCP stream 8",
        ja4="t12d1909h2_d83cc789557e_7af1ed941c26",
        ja3="28a2c9bd18a11de089ef85a160da29e4",
        server_name="mcs2-cloudstation-eu-west-1.prod.hydra.sophos.com",
        legacy_version=0x0303,
        cipher_suites="c02c c02b c030 c02f c024 c023 c028 c027 c00a c009 c014 c013 009d 009c 003d 003c 0035 002f 000a",
        extensions="0000 0005 000a 000b 000d 0023 0010 0017 ff01",
        alpn=(
            b"h2",
            b"http/1.1",
        ),
        versions="",
        groups="001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0804 0805 0806 0401 0501 0201 0403 0503 0203 0202 0601 0603",
    ),
    Vector(
        source="tls-handshake.pcapng, TCP stream 5",
        ja4="t13d1516h1_8daaf6152771_e5627efa2ab1",
        ja3="bee6dc22161d532d945e0daa64213c43",
        server_name="lp-push-server-452.lastpass.com",
        legacy_version=0x0303,
        cipher_suites="4a4a 1301 1302 1303 c02b c02f c02c c030 cca9 cca8 c013 c014 009c 009d 002f 0035",
        extensions="aaaa 000d 0033 0000 ff01 002b 0023 002d 0005 0012 000b 0017 4469 0010 001b 000a 1a1a 0015",
        alpn=(b"http/1.1",),
        versions="aaaa 0304 0303",
        groups="aaaa 001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0403 0804 0401 0503 0805 0501 0806 0601",
    ),
    Vector(
        source="tls-handshake.pcapng, TCP stream 6",
        ja4="t13d151400_8daaf6152771_de4a06bb82e3",
        ja3="bfc66ad4d55e0c1a1847863d4d5c301a",
        server_name="mtalk.google.com",
        legacy_version=0x0303,
        cipher_suites="aaaa 1301 1302 1303 c02b c02f c02c c030 cca9 cca8 c013 c014 009c 009d 002f 0035",
        extensions="1a1a 0033 002b 001b 0000 0012 002d 000d 000a 0005 0023 0017 ff01 000b caca 0015",
        alpn=(),
        versions="9a9a 0304 0303",
        groups="1a1a 001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0403 0804 0401 0503 0805 0501 0806 0601",
    ),
    Vector(
        source="tls-handshake.pcapng, TCP stream 31",
        ja4="t13d1517h1_8daaf6152771_6cdcb247c39b",
        ja3="e2ce5351e791ab3c3f63764919302aca",
        server_name="edge-chat.facebook.com",
        legacy_version=0x0303,
        cipher_suites="baba 1301 1302 1303 c02b c02f c02c c030 cca9 cca8 c013 c014 009c 009d 002f 0035",
        extensions="eaea 0000 0017 0005 002b 0012 0023 000a 0033 0010 002d 001b 4469 000b 000d ff01 fafa 0015 0029",
        alpn=(b"http/1.1",),
        versions="eaea 0304 0303",
        groups="eaea 001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0403 0804 0401 0503 0805 0501 0806 0601",
    ),
    Vector(
        source="tls12.pcap, TCP stream 0",
        ja4="t13d1715h2_5b57614c22b0_3d5424432f57",
        ja3="579ccef312d18482fc42e2b822ca2430",
        server_name="contile.services.mozilla.com",
        legacy_version=0x0303,
        cipher_suites="1301 1303 1302 c02b c02f cca9 cca8 c02c c030 c00a c009 c013 c014 009c 009d 002f 0035",
        extensions="0000 0017 ff01 000a 000b 0023 0010 0005 0022 0033 002b 000d 002d 001c 0015",
        alpn=(
            b"h2",
            b"http/1.1",
        ),
        versions="0304 0303",
        groups="001d 0017 0018 0019 0100 0101",
        point_formats=b"\x00",
        signature_algorithms="0403 0503 0603 0804 0805 0806 0401 0501 0601 0203 0201",
    ),
    Vector(
        source="https-connect.pcap, TCP stream 0 (behind CONNECT; of the Rust snapshot)",
        ja4="t12i860500_e18388e7f3a3_a1e935682795",
        ja3="b288289af2999820648eb3ca4d8304c5",
        server_name=None,
        legacy_version=0x0303,
        cipher_suites=(
            "c030 c02c c028 c024 c014 c00a 00a5 00a3 00a1 009f 006b 006a 0069 0068 0039 0038 0037 0036 0088 0087 "
            "0086 0085 c032 c02e c02a c026 c00f c005 009d 003d 0035 0084 c02f c02b c027 c023 c013 c009 00a4 00a2 "
            "00a0 009e 0067 0040 003f 003e 0033 0032 0031 0030 009a 0099 0098 0097 0045 0044 0043 0042 c031 c02d "
            "c029 c025 c00e c004 009c 003c 002f 0096 0041 c012 c008 0016 0013 0010 000d c00d c003 000a 0007 c011 "
            "c007 c00c c002 0005 0004 00ff"
        ),
        extensions="000b 000a 0023 000d 000f",
        alpn=(),
        versions="",
        groups="0017 0019 0018 0016",
        point_formats=b"\x00\x01\x02",
        signature_algorithms="0601 0602 0603 0501 0502 0503 0401 0402 0403 0301 0302 0303 0201 0202 0203",
    ),
    Vector(
        source="tls-handshake.pcapng, TCP stream 38, after HelloRetryRequest",
        ja4="t13d1515h2_8daaf6152771_f37e75b10bcc",
        ja3="989457eb4c148cbbe80b7799ac9aef59",
        server_name="mem.gfx.ms",
        legacy_version=0x0303,
        cipher_suites="fafa 1301 1302 1303 c02b c02f c02c c030 cca9 cca8 c013 c014 009c 009d 002f 0035",
        extensions="7a7a 0005 001b 0033 002d 4469 000a 000d 0012 ff01 000b 0023 002b 0000 0017 0010 caca",
        alpn=(
            b"h2",
            b"http/1.1",
        ),
        versions="8a8a 0304 0303",
        groups="baba 001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0403 0804 0401 0503 0805 0501 0806 0601",
    ),
    Vector(
        # The snapshots of FoxIO's tools have 99 for these protocols; JA4.md, which is younger, says the ends in hex.
        source="tls-non-ascii-alpn.pcapng, TCP stream 0",
        ja4="t13d1516bd_8daaf6152771_e5627efa2ab1",
        ja3="1c258ebef8eee2dfa3df6d8d07285af9",
        server_name="clientservices.googleapis.com",
        legacy_version=0x0303,
        cipher_suites="aaaa 1301 1302 1303 c02b c02f c02c c030 cca9 cca8 c013 c014 009c 009d 002f 0035",
        extensions="9a9a ff01 0033 002d 0005 4469 000d 0010 0023 001b 002b 0000 0012 000a 0017 000b 6a6a 0015",
        alpn=(
            b"\xba\xad",
            b"http/1.1",
        ),
        versions="0a0a 0304 0303",
        groups="0a0a 001d 0017 0018",
        point_formats=b"\x00",
        signature_algorithms="0403 0804 0401 0503 0805 0501 0806 0601",
    ),
)

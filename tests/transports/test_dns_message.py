"""What name servers say, read as dnspython reads it, or not at all: whoever owns a zone chooses what is in it."""

from __future__ import annotations

import contextlib
import random
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from rama_ebpf.services.dns.message import ContradictoryAnswer, Family, MalformedMessage, Query, Reply

NAMES = ("a.test", "b.test", "c.example", "d.a.test", "x" * 63 + ".test", ".".join(["y" * 60] * 4))
IPV4 = Query("a.test", IPv4Address, 1232, 7)


def reference(data: bytes, query: Query) -> Reply | None:
    """What dnspython makes of it; None for what it does not take for an answer."""
    asked = dns.message.from_wire(query.pack())
    message = dns.message.from_wire(data, ignore_trailing=True)
    if message.id != asked.id or not asked.is_response(message) or message.question != asked.question:
        return None
    if message.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        return Reply(int(message.rcode()))
    assert isinstance(message, dns.message.QueryMessage)
    chain = message.resolve_chaining()
    found = () if chain.answer is None else tuple(ip_address(record.address) for record in list(chain.answer)[:64])
    return Reply(int(message.rcode()), False, found, chain.minimum_ttl)


def some_answer(chance: random.Random, query: Query) -> bytes:
    """An answer with aliases, addresses of both families, and records that nobody asked for."""
    response = dns.message.make_response(dns.message.from_wire(query.pack()))
    response.set_rcode(chance.choice((0, 0, 0, 3, 2, 5, 16)))
    owner = query.name
    for target in chance.sample(NAMES, chance.randrange(3)):
        if target != owner:
            response.answer.append(
                dns.rrset.from_text(owner + ".", chance.randrange(1000), "IN", "CNAME", target + ".")
            )
            owner = target
    for kind, text in (("A", "198.18.{}.{}"), ("AAAA", "2001:db8::{}:{}"), ("TXT", '"{} {}"')):
        texts = [text.format(chance.randrange(200), chance.randrange(200)) for _ in range(chance.randrange(4))]
        if texts:
            response.answer.append(dns.rrset.from_text(owner + ".", chance.randrange(1000), "IN", kind, *texts))
    if chance.random() < 0.5:
        soa = f"ns.test. mail.test. 1 2 3 4 {chance.randrange(1000)}"
        zone = "example." if owner.endswith("example") else "test." if owner.endswith("test") else "."
        response.authority.append(dns.rrset.from_text(zone, chance.randrange(1000), "IN", "SOA", soa))
    return response.to_wire(max_size=65535)


@pytest.mark.parametrize("family", [IPv4Address, IPv6Address])
def test_answers_are_read_as_dnspython_reads_them(family: Family) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(80):
        query = Query.make(chance.choice(NAMES), family, chance.choice((1232, None)))
        data = some_answer(chance, query)
        try:
            expected = reference(data, query)
        except (dns.message.AnswerForNXDOMAIN, dns.message.ChainTooLong):
            with pytest.raises(ContradictoryAnswer):
                query.read(data)
            continue
        found = query.read(data)
        assert found is not None
        assert expected is not None
        assert (found.code, set(found.addresses)) == (expected.code, set(expected.addresses))
        most = 3600 if expected.addresses else 60  # for which they are kept at most
        assert min(found.ttl, most) == min(expected.ttl, most)


def test_whatever_is_changed_in_an_answer_it_is_read_as_dnspython_reads_it_or_not_at_all() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    read = 0
    for _ in range(400):
        data = bytearray(some_answer(chance, IPV4))
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 0xC0, 0xFF, chance.randrange(256)))
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        try:
            found = IPV4.read(bytes(data))
        except MalformedMessage:
            continue
        with contextlib.suppress(dns.exception.DNSException, ValueError):
            expected = reference(bytes(data), IPV4)
            if found is not None and expected is not None and not found.truncated and found.code in (0, 3):
                assert set(found.addresses) == set(expected.addresses), bytes(data).hex()
                read += 1
    assert read > 20


def _head(answers: int) -> bytes:
    question = b"\1a\4test\0" + struct.pack(">2H", 1, 1)
    return struct.pack(">6H", 7, 0x8180, 1, answers, 0, 0) + question


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"\xc0\x18", "BadPointer"),  # to itself
        (b"\xc0\xff", "BadPointer"),  # forward
        (b"\x40abc", "BadLabelType"),
        (b"\x80abc", "BadLabelType"),
        (b"\x3f" + b"a" * 63, "Truncated"),
        ((b"\x3f" + b"a" * 63) * 5 + b"\0", "NameTooLong"),
        (b"\xc0\x0c\0\1\0\1\0\0\0\1\0\5\1\2\3\4", "Truncated"),  # five octets of data, four there
        (b"\xc0\x0c\0\5\0\1\0\0\0\1\0\2\xc0\x0c", "ChainTooLong"),  # an alias of itself
        (b"", "Truncated"),
    ],
)
def test_names_and_records_that_lead_nowhere_are_refused(body: bytes, why: str) -> None:
    with pytest.raises(MalformedMessage, match=why):
        IPV4.read(_head(1) + body)


def test_a_long_way_that_every_record_has_is_gone_once() -> None:
    """Each owner is a pointer to one name of 120 labels: a thousand of them are read as one is."""
    name = b"\1x" * 120 + b"\0"
    first = name + struct.pack(">2HIH", 16, 1, 1, 0)
    at = len(_head(0))
    other = struct.pack(">H", 0xC000 | at) + struct.pack(">2HIH", 16, 1, 1, 0)
    data = _head(1001) + first + other * 1000
    reply = IPV4.read(data)
    assert reply is not None
    assert reply.addresses == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\0\x08" + data[2:],  # another id
        lambda data: data[:2] + b"\x01" + data[3:],  # a question, no answer
        lambda data: data[:2] + b"\xa9" + data[3:],  # of another kind (opcode)
        lambda data: data.replace(b"\1a\4test", b"\1b\4test"),
        lambda data: data[:20] + b"\0\x1c" + data[22:],  # AAAA
        lambda data: data[:4] + bytes(8),  # no question, no error
        lambda data: data[:4] + b"\0\2" + data[6:],
    ],
)
def test_what_answers_another_question_is_none(change) -> None:
    answer = _head(1) + b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4\1\2\3\4"
    found = IPV4.read(answer)
    assert found is not None
    assert found.addresses == (ip_address("1.2.3.4"),)
    assert IPV4.read(change(answer)) is None


def test_an_error_may_leave_the_question_out() -> None:
    found = IPV4.read(struct.pack(">6H", 7, 0x8181, 0, 0, 0, 0))
    assert found is not None
    assert found.code == 1

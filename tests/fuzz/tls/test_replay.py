"""What fuzzing has found stays found: the corpus is replayed, and mutated a little further, in every run."""

from __future__ import annotations

import random
from pathlib import Path

from ...tls.hello import build, extension, handshake, of_vector, records, vec
from ...tls.vectors import VECTORS
from ..corpus import read_corpus
from .targets import client_hello

CORPUS = read_corpus(Path(__file__).with_name("client_hello.corpus"))
SEEDS = [bytes((number,)) + records(of_vector(vector), 400) for number, vector in enumerate(VECTORS)]


def test_the_corpus_breaks_no_guarantee() -> None:
    assert len(CORPUS) >= 10, "the corpus is part of the repository"
    for data in CORPUS:
        client_hello(data)


def test_the_mutated_corpus_breaks_no_guarantee() -> None:
    chance = random.Random(8446)
    for _ in range(10_000):
        client_hello(mutate(chance, chance.choice((CORPUS, SEEDS))))


def test_hellos_built_at_random_are_read_as_openssl_reads_them() -> None:
    chance = random.Random(6066)
    for _ in range(4_000):
        client_hello(bytes((chance.randrange(16),)) + built(chance))


def built(chance: random.Random) -> bytes:
    """A ClientHello that OpenSSL reads up to the server name, often with something odd about it."""
    names = [b"a.test", b"B.Example.TEST", b"a.test.", b"xn--bcher-kva.test", b"x" * 63 + b".test", b"a_b.test"]
    names += [b"", b"a\0b.test", b"127.0.0.1", b"a..b", b"a" * 300, b"\xc3\xa4.test", b"*.test", b"a b"]
    parts = [
        extension(43, vec(1, b"\3\4\3\3")),
        extension(10, vec(2, b"\0\x1d\0\x17")),
        extension(13, vec(2, b"\4\3\x08\4")),
        extension(51, vec(2, b"\0\x1d" + vec(2, chance.randbytes(32)))),
        extension(16, vec(2, b"".join(vec(1, name) for name in chance.sample([b"h2", b"http/1.1", b"x"], 2)))),
        extension(0x2A2A, chance.randbytes(chance.randrange(4))),
    ]
    chance.shuffle(parts)
    entries = b"".join(
        bytes((0 if chance.random() < 0.9 else 1,)) + vec(2, chance.choice(names))
        for _ in range(chance.choice((1, 1, 1, 1, 2)))
    )
    for _ in range(chance.choice((0, 1, 1, 1, 1, 1, 2))):
        extra = b"\0" if chance.random() < 0.1 else b""
        parts.insert(chance.randrange(len(parts) + 1), extension(0, vec(2, entries + extra)))
        entries = b"\0" + vec(2, b"other.test")
    message = handshake(build(b"".join(parts), session_id=chance.randbytes(chance.choice((0, 32)))))
    return records(message, chance.choice((1, 50, 400, 16384))) + chance.randbytes(chance.randrange(4))


def mutate(chance: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = bytes((chance.choice((0, 1, 3, 10, 16, 22, 43, 255, chance.randrange(256))),))
            case 1:
                data[at : at + chance.randint(1, 8)] = b""
            case 2:
                data[at:at] = chance.randbytes(chance.randint(1, 8))
            case 3:
                other = chance.choice(seeds)
                data[at:] = other[chance.randrange(len(other) + 1) :]
            case 4:
                data[at:at] = data[:at][-chance.randint(1, 300) :]
    return bytes(data)

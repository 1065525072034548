"""What fuzzing has found stays found: the corpus is replayed, and mutated a little further, in every run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ..corpus import read_corpus
from .targets import TARGETS

CORPUS = {name: read_corpus(Path(__file__).with_name(f"{name}.corpus")) for name in TARGETS}
MUTATIONS = {"server": 20_000, "client": 10_000, "datagram": 10_000}


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_breaks_no_guarantee(name):
    assert len(CORPUS[name]) >= 10, "the corpus is part of the repository"
    for data in CORPUS[name]:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_corpus_breaks_no_guarantee(name):
    chance = random.Random(1928)
    for _ in range(MUTATIONS[name]):
        TARGETS[name](mutate(chance, CORPUS[name]))


def mutate(chance: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = bytes((chance.choice((0, 1, 2, 3, 4, 5, 127, 255)),))
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

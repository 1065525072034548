"""What fuzzing has found stays found: the corpus is replayed, and mutated a little further, in every run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ..corpus import read_corpus
from ..socks5.test_replay import mutate
from .targets import TARGETS

CORPUS = {name: read_corpus(Path(__file__).with_name(f"{name}.corpus")) for name in TARGETS}
MUTATIONS = {"proxy_header": 10_000, "requests": 2500, "responses": 2500, "h2_fields": 3000}


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_breaks_no_guarantee(name: str) -> None:
    assert len(CORPUS[name]) >= 10, "the corpus is part of the repository"
    for data in CORPUS[name]:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_corpus_breaks_no_guarantee(name: str) -> None:
    chance = random.Random(9112)
    for _ in range(MUTATIONS.get(name, 500)):
        TARGETS[name](mutate(chance, CORPUS[name]))

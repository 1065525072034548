"""The code in docs/http.md runs as it stands there, and the page says of names and figures what is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rama_ebpf.core import Authority, stack
from rama_ebpf.layers import RateLimitLayer, StaticUsers, StrikeLayer
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services import http
from rama_ebpf.services.connect import Connector, SystemResolver
from rama_ebpf.services.http import layers
from rama_ebpf.services.proxy_protocol import ProxyProtocolLayer

from .corpus import BODIES, BROKEN, REQUESTS, RESPONSES

PAGE = (Path(__file__).parents[2] / "docs" / "http.md").read_text()


async def test_every_block_of_python_runs() -> None:
    class Context:
        policy = None

    names: dict[str, Any] = {name: getattr(http, name) for name in http.__all__}
    names |= {name: getattr(layers, name) for name in layers.__all__}
    names |= {
        part.__name__: part for part in (Authority, ProxyProtocolLayer, RateLimitLayer, StaticUsers, StrikeLayer, stack)
    }
    names |= {"connector": Connector(SystemResolver(), EgressPolicy()), "context": Context()}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/http.md", "exec"), names)


def test_every_layer_is_named() -> None:
    for name in set(layers.__all__) - {"MappedBody", "RequestId"}:
        assert f"`{name}" in PAGE or f"={name}(" in PAGE or f"({name}(" in PAGE, name


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert f"corpus of {sum(map(len, (REQUESTS, BODIES, RESPONSES, BROKEN)))} malformed" in PAGE

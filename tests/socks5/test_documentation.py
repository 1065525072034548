"""The code in docs/socks5.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rama_ebpf.core.matchers import TargetHost, UserOption
from rama_ebpf.core.routing import Router
from rama_ebpf.layers.auth import PasswordFile, hash_password
from rama_ebpf.layers.username import DashedUsername, UsernameOptionsLayer
from rama_ebpf.services.http import HttpProxy
from rama_ebpf.services.router import PeekRouter, is_http, is_socks, is_tls
from rama_ebpf.services.socks5 import Socks5Server
from rama_ebpf.services.upstream import parse_chain

PAGE = Path(__file__).parents[2] / "docs" / "socks5.md"


def test_every_block_of_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("users").write_text(f"tom:{hash_password('secret')}\n")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, Any] = {"policy": None}
    for word in (TargetHost, UserOption, Router, PasswordFile, DashedUsername, UsernameOptionsLayer, HttpProxy):
        names[word.__name__] = word
    for function in (PeekRouter, is_http, is_socks, is_tls, Socks5Server, parse_chain):
        names[function.__name__] = function

    async def nowhere(target):
        raise AssertionError

    names["socks"] = names["tls"] = Socks5Server(nowhere)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    names["resolver"].close()

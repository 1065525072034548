"""The code in docs/tls.md runs as it stands there, and so does its configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.config.load import load_config
from rama_ebpf.core import Authority, stack
from rama_ebpf.core.names import NameMap
from rama_ebpf.layers.strikes import StrikeLayer
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services import tls
from rama_ebpf.services.connect import Connector, SystemResolver
from rama_ebpf.services.http import HttpProxy
from rama_ebpf.services.socks5 import Socks5Server

from . import pki

PAGE = Path(__file__).parents[2] / "docs" / "tls.md"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the page names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "certs").mkdir()
    pki.Authority(tmp_path / "certs").issue("a.test", stem="default")
    (tmp_path / "certs" / "tests-CA.pem").unlink()
    tls.CertificateAuthority.create().save(tmp_path / "ca.pem", tmp_path / "ca.key")
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_block_of_python_runs(here: Path) -> None:
    resolver = SystemResolver()

    class Context:
        policy = None

    names: dict[str, Any] = {name: getattr(tls, name) for name in tls.__all__} | {
        "Authority": Authority,
        "HttpProxy": HttpProxy,
        "NameMap": NameMap,
        "Path": Path,
        "Socks5Server": Socks5Server,
        "StrikeLayer": StrikeLayer,
        "connector": Connector(resolver, EgressPolicy()),
        "context": Context(),
        "look": None,
        "stack": stack,
    }
    found = blocks("python")
    assert len(found) == 3
    for block in found:
        exec(compile(block.replace("/etc/rama-ebpf/certs", "certs"), str(PAGE), "exec"), names)
    resolver.close()


def test_the_configuration_is_a_good_one(here: Path) -> None:
    (block,) = blocks("toml")
    listeners = "".join(
        f'[listeners.{name}]\naddress = "127.0.0.1:{port}"\nstack = "{name}"\n'
        for name, port in (("front", 8443), ("https", 8444))
    )
    (here / "rama.toml").write_text(listeners + block)
    assert set(load_config(here / "rama.toml").stacks) == {"front", "https"}

"""TLS in ``rama.toml``: what goes together is served, what does not is told with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rama_ebpf.config.load import ConfigError, config_of, load_config
from rama_ebpf.config.show import effective

from .pki import Authority

HEAD = '[listeners.a]\naddress = "127.0.0.1:1080"\nstack = "s"\n[stacks.s]\n'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    authority = Authority(tmp_path)
    authority.issue("a.test")
    (tmp_path / "certs").mkdir()
    Authority(tmp_path / "certs").issue("b.test")
    (tmp_path / "certs" / "tests-CA.pem").unlink()
    (tmp_path / "crl.pem").write_bytes(authority.revocation_list())
    return tmp_path


def mistake(directory: Path, text: str) -> str:
    (directory / "rama.toml").write_text(HEAD + text)
    with pytest.raises(ConfigError) as refused:
        load_config(directory / "rama.toml")
    (line,) = str(refused.value).splitlines()
    return line.removeprefix(f"{directory / 'rama.toml'}:")


TLS = 'chain = "a.test.crt", key = "a.test.key"'


@pytest.mark.parametrize(
    "text",
    [
        f'service = "echo"\nlayers = [{{ tls = {{ {TLS} }} }}]',
        'service = "echo"\nlayers = [{ tls = { directory = "certs" } }]',
        f'service = "echo"\nlayers = [{{ tls = {{ {TLS}, minimum_version = "1.3", client_ca = "tests-CA.pem", '
        'client_crl = "crl.pem", client_auth = "optional", key_log = "secrets", alpn = ["h2"] } }]',
        'service = "socks5"\nlayers = [{ tls-tunnel = { default = "close", rules = '
        '[{ name = "ours", action = "allow", sni = [".a.test"], alpn = ["h2"], ja4 = ["t13d*"] }] } }]',
        'service = { tls-passthrough = { port = 443, no_sni = "10.0.0.1:443", targets = { "*.a.test" = "b:1" } } }',
    ],
)
def test_a_good_file_is_good_and_the_effective_configuration_is_the_same(directory: Path, text: str) -> None:
    (directory / "rama.toml").write_text(HEAD + text)
    config = load_config(directory / "rama.toml")
    assert config_of(effective(config)) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'service = "echo"\nlayers = [{ tls = { chain = "a.test.crt" } }]',
            "6: stacks.s.layers[0].tls: name chain and",
        ),
        (
            f'service = "echo"\nlayers = [{{ tls = {{ {TLS}, client_crl = "crl.pem" }} }}]',
            "6: stacks.s.layers[0].tls: cl",
        ),
        (f'service = "echo"\nlayers = [{{ tls = {{ {TLS}, client_ca = "a.test.key" }} }}]', "4: stacks.s: /"),
        (
            f'service = "echo"\nlayers = [{{ tls = {{ {TLS}, key_log = "no/where" }} }}]',
            "6: stacks.s.layers[0].tls.key",
        ),
        (
            f'service = "echo"\nlayers = [{{ tls = {{ {TLS}, minimum_version = "1.1" }} }}]',
            "6: stacks.s.layers[0].tls.m",
        ),
        ("service = { tls-passthrough = {} }", "5: stacks.s.service.tls-passthrough: name targets"),
        (
            'service = { tls-passthrough = { targets = { "a*" = "b.test:1" } } }',
            "5: stacks.s.service.tls-passthrough: 'a*'",
        ),
        (
            'service = { tls-passthrough = { port = 443, rules = [{ name = "x", action = "close", sni = ["a.test"], '
            "no_sni = true }] } }",
            "5: stacks.s.service.tls-passthrough.rules[0]: sni and no_sni exclude",
        ),
        (
            'service = "socks5"\nlayers = [{ tls-tunnel = { intercept = { ca = "a.test.crt", ca_key = "a.test.key" '
            "} } }]",
            "4: stacks.s: the certificate is not one of an authority",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line(directory: Path, text: str, expected: str) -> None:
    assert mistake(directory, text).startswith(expected)

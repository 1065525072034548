"""TLS in ``rama.toml``: what goes together is served, what does not is told with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rama_ebpf.config.build import BuildEnvironment
from rama_ebpf.config.load import ConfigError, config_of, load_config
from rama_ebpf.config.show import effective
from rama_ebpf.config.tls import TlsPassthroughSettings, TlsRuleSettings, TlsSettings
from rama_ebpf.core import Authority, Stream, stack
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.tls import Alert

from . import pki
from .conftest import HOST, Serve
from .hello import handshake, records
from .test_match import hello
from .test_peek import exchange

HEAD = '[listeners.a]\naddress = "127.0.0.1:1080"\nstack = "s"\n[stacks.s]\n'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    authority = pki.Authority(tmp_path)
    authority.issue("a.test")
    (tmp_path / "certs").mkdir()
    pki.Authority(tmp_path / "certs").issue("b.test")
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
        'service = "echo"\nlayers = [{ tls = { directory = "certs", default = "strike", rules = '
        '[{ name = "ours", action = "allow", sni = [".b.test"] }] } }]',
        f'service = "echo"\nlayers = [{{ tls = {{ {TLS}, minimum_version = "1.3", client_ca = "tests-CA.pem", '
        'client_crl = "crl.pem", client_auth = "optional", key_log = "secrets", alpn = ["h2"] } }]',
        'service = "socks5"\nlayers = [{ tls-tunnel = { default = "close", rules = '
        '[{ name = "ours", action = "allow", sni = [".a.test"], alpn = ["h2"], ja4 = ["t13d*"] }] } }]',
        'service = { tls-passthrough = { port = 443, no_sni = "10.0.0.1:443", targets = { "*.a.test" = "b:1" } } }',
        'service = { tls-passthrough = { port = 443, fallback = "10.0.0.1:80", fail_open = true } }',
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
        (
            "service = { tls-passthrough = { port = 443, fail_open = true } }",
            "5: stacks.s.service.tls-passthrough: fail_open needs fallback",
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


@pytest.fixture
def environment(connector: Connector) -> BuildEnvironment:
    async def unused(*_: object) -> None:
        raise AssertionError("nothing here strikes or calls")

    return BuildEnvironment(unused, bytes(32), None, connector.resolver, connector.egress, ".", unused)  # type: ignore[arg-type]


async def answer(stream: Stream) -> None:
    while await stream.read():
        pass
    await stream.write(b"fallback")


@pytest.mark.parametrize("fail_open", [False, True], ids=["closed", "open"])
async def test_what_is_no_tls_goes_to_the_fallback_and_a_broken_hello_only_if_it_fails_open(
    serve: Serve, connector: Connector, environment: BuildEnvironment, fail_open: bool
) -> None:
    fallback = serve(answer)
    settings = TlsPassthroughSettings(port=443, fallback=Authority.of(HOST, fallback.port), fail_open=fail_open)
    running = serve(settings.make(environment, connector))
    broken = records(handshake(bytes(range(256))))
    assert await exchange(running, b"GET / HTTP/1.0\r\n\r\n") == b"fallback"
    assert await exchange(running, broken) == (b"fallback" if fail_open else Alert.DECODE_ERROR.record)


async def test_rules_and_fallback_of_a_terminating_listener_hold(
    serve: Serve, environment: BuildEnvironment, directory: Path
) -> None:
    async def never(stream: Stream) -> None:
        raise AssertionError("no handshake of these is good")

    rule = TlsRuleSettings(name="no-a", action="close", sni=("a.test",))
    fallback = serve(answer)
    settings = TlsSettings(
        chain=str(directory / "a.test.crt"),
        key=str(directory / "a.test.key"),
        rules=(rule,),
        fallback=Authority.of(HOST, fallback.port),
    )
    running = serve(stack(settings.make(environment), never))
    assert await exchange(running, b"GET / HTTP/1.0\r\n\r\n") == b"fallback"
    # What passes the rules gets to OpenSSL, for which this hello is too poor.
    assert (await exchange(running, hello(b"b.test")))[-1] == Alert.HANDSHAKE_FAILURE
    assert await exchange(running, hello(b"a.test")) == Alert.ACCESS_DENIED.record

"""``socks5`` in ``rama.toml``: what is switched on is served, and nothing else."""

from __future__ import annotations

import pytest

from rama_ebpf.config.build import BuildEnvironment
from rama_ebpf.config.load import ConfigError, load_config
from rama_ebpf.config.services import Socks5Settings
from rama_ebpf.core.shares import SourceLimits
from rama_ebpf.layers.auth import hash_password

from .conftest import echo
from .peers import BIND, GREETING, UDP_ASSOCIATE, closed_port, exchange, failed, request, start

PUBLIC = {"127.0.0.1": "192.0.2.7", "::1": "2001:db8::7"}
UNSPECIFIED = {"127.0.0.1": "0.0.0.0", "::1": "::"}


def configured(**settings):
    def make(connector):
        environment = BuildEnvironment(None, bytes(32), None, connector.resolver, connector.egress, ".", None)
        return Socks5Settings(**settings).make(environment, connector)

    return make


async def test_udp_and_bind_are_served_where_they_are_switched_on(run_proxy, loopback):
    closed = await run_proxy(make=configured())
    for command in (UDP_ASSOCIATE, BIND):
        assert await exchange(closed, GREETING + request(loopback, 80, command)) == failed(7)
    proxy = await run_proxy(make=configured(udp=True, bind=True, advertise=tuple(PUBLIC.values())))
    for command, name in ((UDP_ASSOCIATE, UNSPECIFIED[loopback]), (BIND, loopback)):
        _reader, writer, bound = await start(proxy, name, 0, command)
        assert bound[0] == PUBLIC[loopback]
        writer.close()


async def test_one_source_has_as_many_associations_and_binds_as_configured(run_proxy, loopback):
    def make(connector):
        limits = SourceLimits(associations=1, binds=1)
        environment = BuildEnvironment(
            None, bytes(32), None, connector.resolver, connector.egress, ".", None, limits=limits
        )
        return Socks5Settings(udp=True, bind=True).make(environment, connector)

    proxy = await run_proxy(make=make)
    for command, name in ((UDP_ASSOCIATE, UNSPECIFIED[loopback]), (BIND, loopback)):
        _reader, writer, _bound = await start(proxy, name, 0, command)
        assert await exchange(proxy, GREETING + request(name, 80, command)) == failed(1)
        writer.close()


async def test_idle_association_ends_when_it_is_configured_to(run_proxy, loopback):
    proxy = await run_proxy(make=configured(udp=True, udp_idle=0.1))
    reader, _writer, _bound = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    assert await reader.read() == b""


async def test_eager_reply_is_given_before_the_outcome(run_proxy, loopback):
    proxy = await run_proxy(make=configured(reply="eager"))
    reader, writer = await proxy.open()
    writer.write(GREETING + request(loopback, closed_port(loopback)))
    with pytest.raises(ConnectionResetError):
        assert await reader.read() is None
    writer.close()


async def test_user_has_as_many_connections_as_configured(run_proxy, run_target, tmp_path):
    users = tmp_path / "users"
    users.write_text(f"tom:{hash_password('secret')}\n")
    host, port = await run_target(echo)
    proxy = await run_proxy(make=configured(users=str(users), user_connections=1))
    login = b"\x05\x01\x02\x01\x03tom\x06secret"
    reader, writer = await proxy.open()
    writer.write(login + request(host, port) + b"x")
    assert (await reader.readuntil(b"x"))[4:7] == b"\x05\x00\x00"
    assert (await exchange(proxy, login + request(host, port)))[4:6] == b"\x05\x02"
    writer.close()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("user_connections = 1", "5: stacks.s.service.socks5: auth_optional and user_connections need users"),
        ('advertise = ["192.0.2.7", "192.0.2.8"]', "5: stacks.s.service.socks5: advertise one address a family"),
        ('advertise = ["host.test"]', "5: stacks.s.service.socks5.advertise[0]: "),
        ('reply = "late"', '5: stacks.s.service.socks5.reply: "late": '),
    ],
)
def test_mistake_is_told_with_its_line(tmp_path, settings, expected):
    file = tmp_path / "rama.toml"
    file.write_text(
        '[listeners.a]\naddress = "127.0.0.1:1080"\nstack = "s"\n[stacks.s]\n'
        f"service = {{ socks5 = {{ {settings} }} }}\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert str(refused.value).removeprefix(f"{file}:").startswith(expected)

"""The egress policy in userspace against its definition; tests/kernel/test_egress.py holds the kernel against it."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest

from rama_ebpf.core import IPAddress, PolicyDenied
from rama_ebpf.policy.egress import DENIED_BY_DEFAULT, EgressPolicy, HostEgress, OwnHost, embedded


def is_denied(policy: EgressPolicy, ip: IPAddress) -> bool:
    """Whether ``ip``, which embeds no other address, is denied by the words of :class:`EgressPolicy`."""
    allowed = max((network.prefixlen for network in policy.allow if ip in network), default=-1)
    denied = max((network.prefixlen for network in policy.deny if ip in network), default=-1)
    if denied >= 0 and denied >= allowed:
        return True
    return any(ip in network and allowed < network.prefixlen for network, _ in DENIED_BY_DEFAULT)


def said(policy: EgressPolicy, ip: IPAddress) -> str | None:
    try:
        policy.check(ip)
    except PolicyDenied as error:
        return error.rule
    return None


def test_random_policies_say_of_random_addresses_what_the_definition_says() -> None:
    pick = random.Random(6)
    differences = []
    denials = 0
    for _ in range(300):
        bits4, bits6 = pick.getrandbits(32), 0x2A << 120 | pick.getrandbits(112)
        networks = []
        for _ in range(pick.randrange(12)):
            if pick.random() < 0.5:
                base, length = bits4 ^ pick.getrandbits(12), pick.randrange(33)
                networks.append(ip_network((base >> 32 - length << 32 - length, length)))
            else:
                base, length = bits6 ^ pick.getrandbits(40), pick.randrange(129)
                whole = base >> 128 - length << 128 - length
                networks.append(ip_network((IPv6Address(whole), length)))
        networks += pick.sample([network for network, _ in DENIED_BY_DEFAULT], 3)
        half = len(networks) // 2
        policy = EgressPolicy(tuple(networks[:half]), tuple(networks[half:]))
        edges = [pick.choice(networks) for _ in range(10)]
        addresses: list[IPAddress] = [IPv4Address(bits4 ^ pick.getrandbits(14)) for _ in range(10)]
        addresses += [IPv6Address(bits6 ^ pick.getrandbits(42)) for _ in range(10)]
        for network in edges:
            addresses += [network[0], network[-1]]
        for ip in addresses:
            if isinstance(ip, IPv6Address) and (ip.ipv4_mapped or embedded(ip) is not None):
                continue
            wanted = is_denied(policy, ip)
            denials += wanted
            if (said(policy, ip) is not None) != wanted:
                differences.append((policy, ip, wanted, said(policy, ip)))
    assert not differences, differences[:3]
    assert denials > 1_000


def test_what_is_embedded_is_judged_as_well() -> None:
    policy = EgressPolicy.of(deny=["8.8.8.0/24"])
    for text in ("::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"):
        assert said(policy, ip_address(text)) == "egress", text
        assert said(EgressPolicy(), ip_address(text)) is None
    assert said(EgressPolicy(), ip_address("64:ff9b::7f00:1")) == "egress-default:loopback"


EMBEDDING = (
    "::ffff:{}",
    "::ffff:0:{}",
    "::{}",
    "64:ff9b::{}",
    "64:ff9b:1::{}",
    "64:ff9b:1:7f00:0:100:{}",
    "2a00:1450::5efe:{}",
    "2a00:1450::200:5efe:{}",
)


def test_every_form_that_embeds_a_denied_ipv4_address_is_denied_even_where_its_own_network_is_allowed() -> None:
    policy = EgressPolicy.of(allow=["::/0", "::/96", "64:ff9b:1::/48", "2001::/32"])
    for form in EMBEDDING:
        ip = ip_address(form.format("127.0.0.1"))
        assert said(policy, ip) == "egress-default:loopback", ip
        assert said(policy, ip_address(form.format("8.8.8.8"))) is None, form
    assert said(policy, ip_address("2002:7f00:1::1")) == "egress-default:loopback"
    assert said(policy, ip_address("2001:0:808:808::80ff:fffe")) == "egress-default:loopback"
    assert said(EgressPolicy.of(allow=["::1/128"]), ip_address("::1")) is None


HOST = OwnHost(
    frozenset(map(ip_network, ("127.0.0.0/8", "127.0.0.1/32", "::1/128", "0.0.0.0/32", "9.9.9.9/32", "2a00::9/128"))),
    frozenset({(ip_address("9.9.9.9"), 1080), (ip_address("0.0.0.0"), 8080), (ip_address("::"), 8443)}),
)


def loops(policy: EgressPolicy, text: str, port: int) -> str | None:
    try:
        policy.check(ip_address(text), port)
    except PolicyDenied as error:
        return error.rule
    return None


def test_the_host_itself_is_denied_unless_its_very_address_is_allowed() -> None:
    for allow in ([], ["0.0.0.0/0", "9.9.9.0/24", "::/0"]):
        policy = EgressPolicy(tuple(map(ip_network, allow)), host=HOST)
        for text in ("9.9.9.9", "::ffff:9.9.9.9", "::ffff:0:9.9.9.9", "64:ff9b::909:909", "2002:909:909::1", "2a00::9"):
            assert said(policy, ip_address(text)) == "egress-default:this-host", text
        assert said(policy, ip_address("9.9.9.8")) is None
    assert said(EgressPolicy((ip_network("9.9.9.9"),), host=HOST), ip_address("9.9.9.9")) is None
    assert said(EgressPolicy(own_addresses=True, host=HOST), ip_address("9.9.9.9")) is None
    assert said(EgressPolicy(own_addresses=True, host=HOST), ip_address("127.0.0.1")) == "egress-default:loopback"
    assert said(EgressPolicy((ip_network("127.0.0.0/8"),), host=HOST), ip_address("127.0.0.1")) is None


def test_the_proxys_own_listeners_are_denied_whatever_is_allowed() -> None:
    everything = tuple(map(ip_network, ("0.0.0.0/8", "127.0.0.0/8", "9.9.9.9/32", "2a00::9/128", "::1/128", "::/128")))
    policy = EgressPolicy(everything, own_addresses=True, host=HOST)
    for text, port in (
        *(("9.9.9.9", 1080), ("::ffff:9.9.9.9", 1080), ("64:ff9b::909:909", 1080), ("0.0.0.0", 1080)),
        *(("127.0.0.1", 8080), ("127.9.9.9", 8080), ("9.9.9.9", 8080), ("::1", 8443), ("2a00::9", 8443)),
        *(("0.0.0.0", 8080), ("::ffff:127.0.0.1", 8080), ("::", 8443)),
    ):
        assert loops(policy, text, port) == "egress-default:this-proxy", (text, port)
    for text, port in (("9.9.9.9", 1081), ("9.9.9.8", 1080), ("127.0.0.1", 1080), ("8.8.8.8", 8080), ("2a00::8", 8443)):
        assert loops(policy, text, port) is None, (text, port)
    assert loops(EgressPolicy(everything, own_listeners=True, host=HOST), "9.9.9.9", 1080) is None


def test_a_policy_over_a_host_follows_its_addresses() -> None:
    egress = HostEgress(EgressPolicy(host=HOST))
    egress.follow(map(ip_network, ["9.9.9.7/32"]))
    egress.check(ip_address("9.9.9.9"))
    with pytest.raises(PolicyDenied, match="this-host"):
        egress.check(ip_address("9.9.9.7"))
    with pytest.raises(PolicyDenied, match="itself listens"):
        egress.check(ip_address("9.9.9.9"), 1080)

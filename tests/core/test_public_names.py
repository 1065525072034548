"""What users may import: a change to it is meant, and seen here."""

from __future__ import annotations

import importlib

import pytest

PUBLIC = {
    "rama_ebpf": "Gate SyncGate __version__",
    "rama_ebpf.gate": (
        "BanEntry Change Counters Decision Difference Events Gate GateError GateEvent GateFailed GateRefused "
        "GateUnavailable Guard GuardRefused Loaded RuleEntry SyncEvents SyncGate"
    ),
    "rama_ebpf.policy": (
        "Action Ban EgressPolicy KernelStore LocalStore PolicyError PolicyStore Prefixes Rule RuleSet Settings Stage "
        "SynLimit Verdict parse_network parse_ttl"
    ),
    "rama_ebpf.services": (
        "Body CertificateAuthority CertificateStore ClientHello ClientTls ConnectError Connector Forward ForwardProxy "
        "Headers HttpError HttpInspector HttpProxy HttpServer Ja4 KeyPair LeafIssuer PeekRouter ProxyHeader "
        "ProxyProtocolConnector ProxyProtocolLayer Request ResolveLayer Response Route Routes ServerTls Socks5Client "
        "Socks5Server TcpServer TlsAction TlsConnector TlsInterceptor TlsMatch TlsPassthrough TlsPeekLayer "
        "TlsPolicyLayer TlsRoute TlsRouter TlsRule TlsTerminateLayer TlsTunnelLayer UdpAssociator UdpServer "
        "UnixConnector UserEgressLayer UserLimits bind_tcp bind_udp bind_unix is_http is_socks is_tls mixed_proxy "
        "parse_chain parse_hop"
    ),
    "rama_ebpf.testing": (
        "Capture Dialled GateLab Host Lab MemoryStream Peer Segment Served Targets gate_lab serve stream_pair"
    ),
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_those_that_are_meant(module: str) -> None:
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module].split())
    for name in found.__all__:
        assert getattr(found, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        found.nonsense  # noqa: B018

"""Routes TLS by server name to backends, which learn the client by PROXY v2, and bans a JA4 in the kernel::

rama-ebpf run sni_router:proxy --listen 0.0.0.0:443 --allow-egress 127.0.0.0/8
"""

from rama_ebpf.core import Authority, NameMap, Service, Stream, stack
from rama_ebpf.layers import StrikeLayer
from rama_ebpf.process import WorkerContext
from rama_ebpf.services import ProxyProtocolConnector
from rama_ebpf.services.tls import TlsAction, TlsMatch, TlsPassthrough, TlsPeekLayer, TlsPolicyLayer, TlsRule

BACKENDS = NameMap([("a.example", Authority.of("127.0.0.1", 8443)), ("*.b.example", Authority.of("127.0.0.1", 9443))])
SCANNERS = TlsRule("scanners", TlsMatch(ja4=["t13i*"]), TlsAction.STRIKE)


def proxy(context: WorkerContext) -> Service[Stream, object]:
    backends = TlsPassthrough(ProxyProtocolConnector(context.connector()), targets=BACKENDS, port=None)
    return stack(StrikeLayer(context.policy, strikes=1), TlsPeekLayer(), TlsPolicyLayer([SCANNERS]), backends)

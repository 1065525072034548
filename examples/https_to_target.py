"""``http + tls + tcp ▸ target``: an HTTP proxy that clients reach over TLS, so that their passwords stay secret::

rama-ebpf run https_to_target:proxy --listen 0.0.0.0:8443
curl --proxy https://tom:secret@proxy.example:8443 http://www.example.com/
"""

from __future__ import annotations

from pathlib import Path

from rama_ebpf.core import Service, Stream, stack
from rama_ebpf.layers import StaticUsers, StrikeLayer, TimeoutLayer
from rama_ebpf.process import WorkerContext
from rama_ebpf.services.http import HttpProxy
from rama_ebpf.services.http.layers import ProxyAuthLayer
from rama_ebpf.services.tls import CertificateStore, KeyPair, ServerTls, TlsTerminateLayer


def proxy(context: WorkerContext) -> Service[Stream, None]:
    """Transport layers, TLS, then HTTP with layers of its own."""
    certificates = CertificateStore.of_files(ServerTls(), KeyPair(Path("server.crt"), Path("server.key")))
    return stack(
        StrikeLayer(context.policy),
        TimeoutLayer(handshake=10, idle=60),
        TlsTerminateLayer(certificates),
        HttpProxy(context.connector(), layers=[ProxyAuthLayer(StaticUsers({"tom": "secret"}))]),
    )

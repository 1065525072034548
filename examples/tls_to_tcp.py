"""``tcp ▸ layers ▸ tls ▸ layers ▸ tcp client``: terminates TLS in front of a plain service::

    BACKEND=127.0.0.1:8080 rama-ebpf run tls_to_tcp:proxy --listen 0.0.0.0:443 --allow-egress 127.0.0.1

The certificate is in ``server.crt``, its key in ``server.key``; replaced files serve the next client.
"""

from __future__ import annotations

import os
from pathlib import Path

from rama_ebpf.core import Authority, Service, Stream, stack
from rama_ebpf.layers import ConcurrencyLimitLayer, ThrottleLayer, TimeoutLayer, by_source
from rama_ebpf.process import WorkerContext
from rama_ebpf.relay import TunnelReport
from rama_ebpf.services.forward import Forward
from rama_ebpf.services.tls import CertificateStore, KeyPair, ServerTls, TlsTerminateLayer


def proxy(context: WorkerContext) -> Service[Stream, TunnelReport]:
    """Layers outside TLS see ciphertext and cost a handshake's flood nothing; those inside see what was said."""
    host, _, port = os.environ["BACKEND"].rpartition(":")
    certificates = CertificateStore.of_files(ServerTls(), KeyPair(Path("server.crt"), Path("server.key")))
    return stack(
        ConcurrencyLimitLayer(50, key=by_source()),
        TimeoutLayer(handshake=10, idle=300),
        TlsTerminateLayer(certificates),
        ThrottleLayer(down=50_000_000),
        Forward(context.connector(), Authority.of(host, int(port))),
    )

"""SOCKS5 and HTTP on one port, each with its own users, as in rama's example of that name::

rama-ebpf run socks5_and_http:proxy --listen 127.0.0.1:62023
curl --proxy http://tom:clancy@127.0.0.1:62023 http://www.example.com/
curl --proxy socks5h://john:secret@127.0.0.1:62023 http://www.example.com/
"""

from __future__ import annotations

from typing import Any

from rama_ebpf.core import Service, Stream, stack
from rama_ebpf.layers import StaticUsers, TimeoutLayer
from rama_ebpf.process import WorkerContext
from rama_ebpf.services.http import HttpProxy
from rama_ebpf.services.http.layers import ProxyAuthLayer
from rama_ebpf.services.router import PeekRouter, is_socks
from rama_ebpf.services.socks5 import Socks5Server


def proxy(context: WorkerContext) -> Service[Stream, Any]:
    """The router looks at the first bytes and consumes none; what is not SOCKS is HTTP, or gets an error of HTTP."""
    connector = context.connector(timeout=30)
    http = HttpProxy(connector, layers=[ProxyAuthLayer(StaticUsers({"tom": "clancy"}))])
    socks5 = Socks5Server(connector, auth=StaticUsers({"john": "secret"}), socks4=False)
    return stack(TimeoutLayer(handshake=30), PeekRouter((is_socks, socks5), fallback=http))

"""``tcp ▸ socks5 ▸ target``: the smallest proxy::

rama-ebpf run socks5_to_target:proxy
"""

from __future__ import annotations

from rama_ebpf.process import WorkerContext
from rama_ebpf.services.socks5 import Socks5Server


def proxy(context: WorkerContext) -> Socks5Server:
    """A plain ``async`` callable is a service: no layer is needed."""
    return Socks5Server(context.connector())

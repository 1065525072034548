"""A SOCKS5 proxy with passwords, limits, time-outs, metrics and bans in the kernel. Run it beside users.txt:

rama-ebpf passwd tom >> users.txt
rama-ebpf run newcomer:proxy --metrics 127.0.0.1:9464
"""

from rama_ebpf.core import Service, Stream, stack
from rama_ebpf.layers import ConcurrencyLimitLayer, PasswordFile, RateLimitLayer, StrikeLayer, TimeoutLayer, by_source
from rama_ebpf.process import WorkerContext
from rama_ebpf.relay import TunnelReport
from rama_ebpf.services.socks5 import Socks5Server


def proxy(context: WorkerContext) -> Service[Stream, TunnelReport]:
    return stack(
        StrikeLayer(context.policy, strikes=3, window=60, ban=3600),  # the fourth SYN gets no answer
        ConcurrencyLimitLayer(10_000, shared=context.shared),  # one count for all workers
        ConcurrencyLimitLayer(100, key=by_source(), shared=context.shared),
        RateLimitLayer(50, burst=100, key=by_source(), shared=context.shared),
        TimeoutLayer(handshake=10, idle=300, total=86_400),
        Socks5Server(context.connector(), auth=PasswordFile("users.txt")),
    )

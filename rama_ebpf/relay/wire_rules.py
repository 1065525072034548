"""Which tunnels the wire relay takes: rules with names, asked one after the other. What is doubtful is refused.

A tunnel that is refused goes on by another relay, and is counted by the name of the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..kernel.tcp_facts import ESTABLISHED, TcpFacts, TcpOption
from ..kernel.wire import Snapshot

__all__ = ["RULES", "End", "Refused", "check"]

_WINDOW_TOLERANCE: Final = 2048
"""Bytes by which an end's window may be smaller than what the other was promised: rounded off by window scaling."""
_RTT_RATIO: Final = 4
_RTT_FLOOR: Final = 0.005
"""Seconds by which round-trip times may differ, whatever their ratio."""
_TCP_IP_BYTES: Final = {False: 40, True: 60}
_STAMP_BYTES: Final = 12
_LOOPBACK_MTU: Final = 16_000
"""Above that the MSS is bounded by windows, and not by the path."""


class Refused(Exception):
    """The wire relay does not take a tunnel; the text is the name of the rule."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of a tunnel: what its socket tells, and what it is at this moment."""

    facts: TcpFacts
    now: Snapshot

    @property
    def carries(self) -> int:
        """Bytes of TCP payload and timestamps that one packet to this end may have."""
        facts = self.facts
        most = facts.pmtu - _TCP_IP_BYTES[facts.arriving.v6]
        if facts.pmtu >= _LOOPBACK_MTU:
            return most
        return min(most, facts.snd_mss + (_STAMP_BYTES if TcpOption.TIMESTAMPS in facts.options else 0))


def _both(test: Callable[[End], bool]) -> Callable[[End, End], bool]:
    return lambda client, target: test(client) and test(target)


def _same(*options: TcpOption) -> Callable[[End, End], bool]:
    def test(client: End, target: End) -> bool:
        differ = client.facts.options ^ target.facts.options
        return not any(option in differ for option in options)

    return test


def _fit(client: End, target: End) -> bool:
    return client.facts.advmss <= target.carries and target.facts.advmss <= client.carries


def _windows_hold(client: End, target: End) -> bool:
    """A window never shrinks by an acknowledgement that moves nothing (RFC 9293 section 3.8.6.2.1)."""
    return (
        client.now.snd_wnd + _WINDOW_TOLERANCE >= target.now.promised
        and target.now.snd_wnd + _WINDOW_TOLERANCE >= client.now.promised
    )


def _rtts_are_alike(client: End, target: End) -> bool:
    """BBR has learned the shortest round trip of its own leg alone, and would send far too slowly on both."""
    short, long = sorted((client.facts.rtt, target.facts.rtt))
    return long <= _RTT_RATIO * short or long - short <= _RTT_FLOOR


RULES: Final[dict[str, Callable[[End, End], bool]]] = {
    "a socket is not plain TCP": _both(lambda end: end.facts.tcp and not end.facts.layered),
    "a connection is not established": _both(
        lambda end: bool(end.now.found) and end.now.state == ESTABLISHED == end.facts.state
    ),
    "one leg is IPv4 and one IPv6": lambda client, target: client.facts.arriving.v6 == target.facts.arriving.v6,
    "a link-local address": _both(lambda end: not end.facts.link_local),
    "a mark, an interface or a type of service is set": _both(lambda end: not end.facts.marked),
    "the legs differ in timestamps or SACK": _same(TcpOption.TIMESTAMPS, TcpOption.SACK),
    "ECN": _both(lambda end: not end.facts.options & (TcpOption.ECN | TcpOption.ECN_SEEN)),
    "timestamps in microseconds": _both(lambda end: TcpOption.USEC_TIMESTAMPS not in end.facts.options),
    "bytes have come already": _both(lambda end: end.now.rcv_nxt == end.now.copied_seq and not end.now.backlog),
    "segments out of order": _both(lambda end: not end.now.out_of_order),
    "bytes are waiting to be sent": _both(lambda end: end.now.snd_nxt == end.now.write_seq),
    "the legs differ in segment size": _fit,
    "an end takes less than the other was promised": _windows_hold,
    "the legs differ in round-trip time": _rtts_are_alike,
}
"""By name, each what has to be true."""


def check(client: End, target: End) -> None:
    """Raise :class:`Refused` with the first rule that a tunnel does not meet."""
    for name, holds in RULES.items():
        if not holds(client, target):
            raise Refused(name)

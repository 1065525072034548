"""``python -m tests.relay.scripts``: segments written by hand, to a target that is reached directly and to one behind
the wire relay; what comes back must be the same.

Scripts are of closing, resets, zero windows, SACK, timestamps and PAWS, keep-alive, urgent data, and of segments that
are forged or broken. The target is a socket of the kernel. Needs root; prints one line a script, and ends with exit
code 1 if any answer differs.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess
from .script import ACK, FIN, PSH, RST, SYN, URG, Answer, Script

__all__ = ["SCRIPTS", "Play", "both_ways"]

_SOURCE = "198.18.0.200"
"""Nobody's address: the kernel says nothing for it."""
_BLOCK = bytes(range(250)) * 4

Play = Callable[[Script, socket.socket], list[object]]
"""Plays with a script against the target's socket; returns what is to be the same."""


def closes_first(script: Script, target: socket.socket) -> list[object]:
    script.say(b"a word")
    got = target.recv(100)
    script.send(FIN | ACK)
    script._said += 1
    seen = condensed(script.answers())
    eof = target.recv(1)
    target.sendall(b"after your end")
    script.hear(14)
    target.close()
    seen += condensed(script.answers())
    script.send(ACK, ack=15)
    return [got, eof, *seen, *condensed(script.answers())]


def is_closed_first(script: Script, target: socket.socket) -> list[object]:
    target.shutdown(socket.SHUT_WR)
    seen = condensed(script.answers())
    script.send(ACK, ack=1)
    script._heard = 1
    script.say(b"half of it goes on")
    got = target.recv(100)
    seen += condensed(script.answers())
    script.send(FIN | ACK)
    script._said += 1
    return [got, *seen, *condensed(script.answers()), target.recv(1)]


def closes_at_once(script: Script, target: socket.socket) -> list[object]:
    """Both ends at the same time: the FINs cross."""
    target.shutdown(socket.SHUT_WR)
    script.send(FIN | ACK, ack=0)
    script._said += 1
    seen = condensed(script.answers())
    script.send(ACK, ack=1)
    return [*seen, *condensed(script.answers()), target.recv(1)]


def resets(script: Script, target: socket.socket) -> list[object]:
    """Where it is expected; before that within the window (a challenge, RFC 5961 section 3) and outside of it."""
    script.send(RST, seq=100)
    seen: list[object] = list(condensed(script.answers()))
    script.send(RST, seq=1 << 30)
    seen += condensed(script.answers())
    target.sendall(b"it lives")
    seen.append(script.hear(8))
    script.send(RST)
    try:
        seen.append(target.recv(1))
    except ConnectionResetError:
        seen.append("reset")
    return seen


def is_reset(script: Script, target: socket.socket) -> list[object]:
    script.say(b"nobody reads this")
    script.answers()
    target.close()  # with unread bytes
    return condensed(script.answers())


def opens_its_window_late(script: Script, target: socket.socket) -> list[object]:
    script.send(ACK, window=0)
    script.answers(0.1)
    target.sendall(_BLOCK)
    probes = condensed(script.answers(1.0))[:1]  # how many come is a matter of time
    script.send(ACK, window=512)
    return [*probes, script.hear(len(_BLOCK)) == _BLOCK]


def fills_a_window(script: Script, target: socket.socket) -> list[object]:
    """The target's: a probe behind it is answered and not taken, and its opening is told."""
    target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    taken = 0
    for _ in range(300):
        script.send(ACK | PSH, seq=taken, data=_BLOCK)
        answers = script.answers(0.05)
        taken = max([taken, *(answer.ack for answer in answers)])
        if answers and not answers[-1].window_open:
            break
    script.send(ACK, seq=taken, data=b"?")
    closed = script.answers(0.5)
    got = 0
    while got < taken:
        got += len(target.recv(1 << 16))
    opened = script.answers(0.5)
    script.send(ACK | PSH, seq=taken, data=b"goes on")
    return [
        [(answer.flags, answer.ack - taken, answer.window_open) for answer in closed],
        any(answer.window_open for answer in opened),
        target.recv(100),
    ]


def comes_out_of_order(script: Script, target: socket.socket) -> list[object]:
    """Gaps are told by SACK, a repetition by D-SACK (RFC 2883)."""
    seen: list[object] = []
    for number in (1, 3, 5):
        script.send(ACK | PSH, seq=number * 1000, data=_BLOCK)
        seen += script.answers(0.1)
    script.send(ACK | PSH, seq=0, data=_BLOCK)
    seen += condensed(script.answers())
    script.send(ACK | PSH, seq=1000, data=_BLOCK)
    seen += script.answers(0.1)
    for number in (2, 4):
        script.send(ACK | PSH, seq=number * 1000, data=_BLOCK)
    script._said = 6000
    seen += condensed(script.answers())
    got = bytearray()
    while len(got) < 6000:
        got += target.recv(1 << 16)
    return [*seen, bytes(got) == _BLOCK * 6]


def loses_what_it_hears(script: Script, target: socket.socket) -> list[object]:
    """The target sends again what our SACK says is missing."""
    target.sendall(_BLOCK * 4)
    first = [answer for answer in script.answers(0.1) if answer.size]
    edges = struct.pack("!BBBBII", 1, 1, 5, 10, *(_after(script, at) for at in (1460, 4000)))
    stamps = b"\1\1\x08\x0a" + struct.pack("!II", script._clock & 0xFFFFFFFF, script._recent)
    for _ in range(3):
        script.send(ACK, ack=0, options=stamps + edges)
    again = [answer for answer in script.answers(0.5) if answer.size]
    return [sum(answer.size for answer in first), {(answer.seq) for answer in again}]


def _after(script: Script, at: int) -> int:
    return (script._base + at) & 0xFFFFFFFF


def is_old(script: Script, target: socket.socket) -> list[object]:
    """PAWS (RFC 7323 section 5): a timestamp of the past is no segment of this time, though its number may be."""
    script.say(b"now")
    got = target.recv(100)
    script.answers()
    script.send(ACK | PSH, data=b"then", stamp=60)
    seen = script.answers()
    script.send(ACK | PSH, data=b"here")
    script._said += 4
    return [got, *seen, target.recv(100), all(answer.stamped for answer in script.answers())]


def keeps_alive(script: Script, target: socket.socket) -> list[object]:
    """Ours is answered; the target's own comes, and is satisfied."""
    script.say(b"x")
    got = target.recv(1)
    script.answers()
    script.send(ACK, seq=script._said - 1)
    seen: list[object] = list(script.answers())
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 2)):
        target.setsockopt(socket.IPPROTO_TCP, option, value)
    target.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for _ in range(3):
        seen.append(script.answer(5))
        script.send(ACK)
    target.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    target.sendall(b"alive")
    return [got, *seen, script.hear(5)]


def is_urgent(script: Script, target: socket.socket) -> list[object]:
    script.send(ACK | PSH | URG, data=b"abc!", urgent=4)
    script._said += 4
    wait_for(lambda: _urgent(target), what="urgent data")
    return [target.recv(1, socket.MSG_OOB), target.recv(100), *condensed(script.answers())]


def _urgent(target: socket.socket) -> bool:
    try:
        return target.recv(1, socket.MSG_OOB | socket.MSG_PEEK) == b"!"
    except OSError:
        return False


def is_forged_or_broken(script: Script, target: socket.socket) -> list[object]:
    """Outside of the window, of what was never said, a new connection, a wrong checksum."""
    seen: list[object] = []
    script.send(ACK | PSH, seq=1 << 30, data=b"far ahead")
    seen += script.answers()
    script.send(ACK | PSH, seq=-5000, data=b"long ago")
    seen += script.answers()
    script.send(ACK | PSH, data=b"unsaid", ack=1 << 20)
    seen += script.answers()
    script.send(SYN, seq=77)
    seen += script.answers()
    script.send(ACK | PSH, data=b"broken", broken=True)
    seen += script.answers()
    script.say(b"good")
    return [*map(_without_window, seen), target.recv(100)]


def _without_window(answer: object) -> object:
    return (answer.flags, answer.seq, answer.ack, answer.size) if isinstance(answer, Answer) else answer


SCRIPTS: dict[str, Play] = {
    play.__name__: play
    for play in (
        closes_first,
        is_closed_first,
        closes_at_once,
        resets,
        is_reset,
        opens_its_window_late,
        fills_a_window,
        comes_out_of_order,
        loses_what_it_hears,
        is_old,
        keeps_alive,
        is_urgent,
        is_forged_or_broken,
    )
}


def condensed(answers: list[Answer]) -> list[object]:
    """Without acknowledgements that a later one contains: whether they wait for each other is a matter of time."""
    kept: list[Answer] = []
    for answer in answers:
        if kept and answer.flags == "A" == kept[-1].flags and not (kept[-1].size or kept[-1].sack or answer.sack):
            kept.pop()
        kept.append(answer)
    return list(kept)


def _address(host: Host) -> bytes:
    """The MAC address of a host's interface."""
    shown = host.run("ip", "-o", "link", "show", "eth0").stdout
    return bytes.fromhex(shown.split("link/ether ")[1].split()[0].replace(":", ""))


class Stage:
    """Where scripts are played: from ``client`` to ``target``, directly or through ``proxy`` at ``port``."""

    def __init__(self, client: Host, proxy: Host, target: Host, port: int) -> None:
        self._client, self._proxy, self._target, self._port = client, proxy, target, port
        self._sport = 20_000 + os.getpid() % 1000
        mac = _address(client).hex(":")
        for host in (proxy, target):
            host.ip("neigh", "replace", _SOURCE, "lladdr", mac, "dev", "eth0", "nud", "permanent")

    def _script(self, gateway: Host, port: int) -> Script:
        self._sport += 1
        return self._client.call(
            lambda: Script("eth0", _address(gateway), (_SOURCE, self._sport), (gateway.ipv4, port))
        )

    def _listener(self) -> socket.socket:
        listener = self._target.socket()
        listener.bind((self._target.ipv4, 0))
        listener.listen()
        return listener

    def direct(self, play: Play) -> list[object]:
        """Play it to the target itself."""
        with self._listener() as listener, closing(self._script(self._target, listener.getsockname()[1])) as script:
            script.open()
            target, _ = listener.accept()
            with target:
                return self._play(play, script, target)

    def relayed(self, play: Play, taken: Callable[[str], bool]) -> list[object]:
        """Play it through the proxy, once ``taken`` says that the connection of an address is translated."""
        for _ in range(20):
            with self._listener() as listener, closing(self._script(self._proxy, self._port)) as script:
                script.open()
                script.say(b"\5\1\0")
                script.hear(2)
                name, port = listener.getsockname()
                script.say(b"\5\1\0\1" + socket.inet_aton(name) + port.to_bytes(2, "big"))
                script.hear(10)
                target, _ = listener.accept()
                with target:
                    script.say(b"first")
                    assert target.recv(5, socket.MSG_WAITALL) == b"first"
                    target.sendall(b"first")
                    script.hear(5)
                    if not taken(f"{_SOURCE}:{self._sport}"):
                        script.send(RST)
                        continue
                    script.answers(0.1)
                    script.rebase()
                    return self._play(play, script, target)
        raise AssertionError("the relay takes none")

    @staticmethod
    def _play(play: Play, script: Script, target: socket.socket) -> list[object]:
        target.settimeout(20)
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            return play(script, target)
        finally:
            script.send(RST)


def both_ways(stage: Stage, play: Play, taken: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """What comes back directly, and through the relay."""
    return [str(each) for each in stage.direct(play)], [str(each) for each in stage.relayed(play, taken)]


_CONFIG = """
[server]
workers = 1
[egress]
allow = ["198.18.0.0/15"]
[listeners.main]
address = "0.0.0.0:1080"
stack = "socks"
relay = "wire"
[stacks.socks]
service = { socks5 = {} }
"""


def main() -> int:
    instance = f"test-{os.getpid()}-scripts"
    differ = 0
    with ExitStack() as stack:
        lab = stack.enter_context(Lab())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rama-ebpf-test-")))
        directory.chmod(0o755)
        os.environ.setdefault("RAMA_EBPF_STATE_DIR", f"{directory}/state")
        (directory / "rama.toml").write_text(_CONFIG)
        client, proxy, target = (lab.host(name) for name in ("client", "proxy", "target"))
        server = ProxyProcess(proxy, instance, "--config", str(directory / "rama.toml")).start()
        stack.callback(unload, Instance(instance))
        stack.callback(server.end)
        wait_for(lambda: Instance(instance).read_state()["wire"]["state"] == "ready", timeout=60, what="the relay")  # type: ignore[index]
        stage = Stage(client, proxy, target, 1080)

        def taken(source: str) -> bool:
            rows = server.json("flows")["flows"]
            return any(row["source"] == source and row["relay"] == "wire" for row in rows)

        for name, play in SCRIPTS.items():
            direct, relayed = both_ways(stage, play, taken)
            same = direct == relayed
            differ += not same
            print(f"{name}: {'the same, ' + str(len(direct)) + ' observations' if same else 'DIFFERS'}", flush=True)
            if not same:
                print(f"  direct:  {direct}\n  relayed: {relayed}", flush=True)
    print(f"{len(SCRIPTS)} scripts, {differ} differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())

"""The server killed at each call of its start, a reload and its stop, and these calls made to fail.

Denied sources connect all the while, and none may get in: not before the gate stands, not after it fell, and not
between two configurations. What must hold beside that:

- a start that failed leaves the policy as it was, and the next one serves it; so does one after a death at any call;
- a reload is done or refused, in words, and clients get the verdicts of one configuration or of the other;
- a stop ends the server, and nothing of it is left: no worker, no cgroup, and no pins but those that were to be kept.
"""

from __future__ import annotations

import itertools
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rama_ebpf.kernel import bpffs, cgroup

from ..hammer import Denied
from ..lab import Host, wait_for
from ..proxy import ProxyProcess
from .interpose import Call, Fault, Watch, receive_listener
from .points import ERRORS
from .scene import PORT, SERVER, SOURCES, Policy, Scene, Verdicts

__all__ = ["ServerTrial", "WatchedProxy"]

_STARTED = r"ready after"
_RELOADED = r"rama_ebpf\.supervisor: reloaded$"
_NOT_RELOADED = r"reload failed"


class WatchedProxy(ProxyProcess):
    """``rama-ebpf run`` whose calls are watched from the first one on."""

    watch: Watch

    def __init__(self, host: Host, instance: str, roots: Sequence[str], *args: str) -> None:
        super().__init__(host, instance, *args)
        self._roots = roots
        self._answering: threading.Thread | None = None

    def launch(self, fault: Fault | None) -> None:
        """Start it, and do not wait for it. ``fault`` happens in the start."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                under = (sys.executable, "-m", "tests.crash.under", str(theirs.fileno()))
                self._launch(*under, pass_fds=[theirs.fileno()])
            _, listener = receive_listener(ours)
        assert listener >= 0, self.log
        self.watch = Watch(listener, self.pid, self._roots)
        self.watch.arm(fault)
        self._answering = threading.Thread(target=self._answer, args=(self.watch,), daemon=True)
        self._answering.start()

    @staticmethod
    def _answer(watch: Watch) -> None:
        try:
            watch.run()
        finally:
            watch.close()

    def over(self) -> bool:
        """Whether it has ended."""
        assert self._process is not None
        return self._process.poll() is not None

    def end(self) -> None:
        super().end()
        if self._answering is not None:
            self._answering.join(30)


CONFIG = """
[server]
workers = 1
drain = "100ms"
[limits]
max_rules = 64
max_bans = 64
[listeners.four]
address = "{four}:{port}"
stack = "echo"
[listeners.six]
address = "[{six}]:{port}"
stack = "echo"
[stacks.echo]
service = {{ echo = {{}} }}
[policy]
default = "allow"
failsafe = ["198.18.4.1"]
"""
RULES_A = """
[[policy.rules]]
name = "a"
action = "drop"
sources = ["198.18.5.0/25", "2001:db8:2::/48"]
"""
RULES_B = """
[[policy.rules]]
name = "a"
action = "drop"
sources = ["198.18.5.0/24", "2001:db8:1::/64"]
"""
DENIED = ("blocked", "banned", "in the set", "blocked IPv6")
"""Sources that all configurations of these tests deny."""


@dataclass
class ServerTrial:
    """Tries the life of one server. ``faults`` are what did not hold."""

    scene: Scene
    directory: Path
    tried: int = 0
    faults: list[str] = field(default_factory=list)
    _errors: Iterator[int] = field(default_factory=lambda: itertools.cycle(ERRORS))

    def __post_init__(self) -> None:
        self._file = self.directory / "rama.toml"
        self._configure(RULES_A)

    def _configure(self, rules: str, *, persist: bool = False) -> None:
        text = CONFIG.format(four=SERVER[4], six=SERVER[6], port=PORT)
        self._file.write_text(text + (f"persist = {str(persist).lower()}\n") + rules)

    def _new(self) -> WatchedProxy:
        proxy = WatchedProxy(self.scene.host, self.scene.instance.name, self.scene.roots, "--config", str(self._file))
        self.scene.proxy = proxy
        return proxy

    def _up(self) -> WatchedProxy:
        proxy = self._new()
        proxy.launch(None)
        wait_for(lambda: proxy.logged(_STARTED) or proxy.over(), timeout=60, what="the start")
        if proxy.over():
            raise AssertionError("the server does not start:\n" + "\n".join(proxy.log))
        return proxy

    @contextmanager
    def _hammering(self, what: str) -> Iterator[None]:
        targets = [(address, PORT) for address in SERVER.values()]
        with Denied(self.scene.host, [SOURCES[name] for name in DENIED], targets) as hammer:
            yield
        if hammer.got_in:
            self.faults.append(f"{what}: {len(hammer.got_in)} of {hammer.tries} denied connections GOT IN")

    def points(self, calls: Sequence[Call], every: int) -> Iterator[Fault]:
        """Death and an error at each call that changes something, an error in turn at each of the others; with
        ``every`` above 1 at every so many of them."""
        changing = [at for at, call in enumerate(calls) if call.changes]
        others = [at for at, call in enumerate(calls) if not call.changes]
        for at in changing[every // 2 :: every]:
            yield Fault(at)
            yield Fault(at, next(self._errors))
        for at in others[every // 2 :: every]:
            yield Fault(at, next(self._errors))

    # -- start ---------------------------------------------------------------------------------------------------

    def start(self, *, every: int = 1) -> None:
        """Of a server that finds the policy of one that was killed."""
        scene = self.scene
        self._configure(RULES_A)
        scene.crash()
        self._up()  # so that what is saved is what the configuration says, whatever was tried before
        policy, wanted = self._saved(), scene.connect_all()
        scene.crash()
        proxy = self._up()
        calls = list(proxy.watch.calls)
        for fault in self.points(calls, every):
            scene.crash()
            scene.put_back(policy)
            what = f"start, {fault} {fault.at} {calls[fault.at]}"
            with self._hammering(what):
                self._start_with(fault, what, wanted)
            self._no_strange_files(what)

    def _start_with(self, fault: Fault, what: str, wanted: Verdicts) -> None:
        proxy = self._new()
        proxy.launch(fault)
        wait_for(lambda: proxy.logged(_STARTED) or proxy.over(), timeout=60, what=what)
        self.tried += proxy.watch.happened
        if not proxy.over():
            self._compare(what, self.scene.connect_all(), wanted)
            return
        if fault.error:
            self._words(what, proxy)
        proxy.end()
        try:
            self._up()
        except AssertionError as error:
            self.faults.append(f"{what}: no start afterwards: {error}")
            self.scene.proxy.end()
            self._up()
        self._compare(f"{what}, and a start", self.scene.connect_all(), wanted)

    def _words(self, what: str, proxy: ProxyProcess) -> None:
        text = "\n".join(proxy.log[-12:])
        if "Traceback" in text:
            self.faults.append(f"{what}: a traceback:\n{text}")
        elif proxy.wait() not in (2, 3):
            self.faults.append(f"{what}: exit {proxy.wait()}: {text}")
        elif not text:
            self.faults.append(f"{what}: ends without a word")

    def _compare(self, what: str, met: Verdicts, *wanted: Verdicts) -> None:
        told = self.scene.told()
        if met not in wanted:
            self.faults.append(f"{what}: {dict(met)}, wanted {' or '.join(str(dict(one)) for one in wanted)}")
        if told != met:
            self.faults.append(f"{what}: test says {dict(told)}, the kernel does {dict(met)}")

    def _saved(self) -> Policy:
        """The policy, with no file of it half written: that one would be put back at each point."""
        wait_for(lambda: not self.scene.unfinished_files(), what="the end of what is being written")
        return self.scene.save()

    def _no_strange_files(self, what: str) -> None:
        place = self.scene.instance

        def strange() -> list[Path]:
            pins = [path for path in place.pin_root.glob("*") if path != place.pin_dir]
            return pins + self.scene.unfinished_files()

        try:
            wait_for(lambda: not strange(), what="the end of what is being written")
        except AssertionError:
            self.faults.append(f"{what}: left over while a server runs: {', '.join(map(str, strange()))}")

    # -- reload --------------------------------------------------------------------------------------------------

    def reload(self, *, every: int = 1) -> None:
        """From one set of rules to another."""
        scene = self.scene
        self._configure(RULES_A)
        if not isinstance(scene.proxy, WatchedProxy):
            scene.crash()
            self._up()
        policy, before = self._saved(), scene.connect_all()
        calls = self._reloaded(None, RULES_B)
        after = scene.connect_all()
        assert after != before
        for fault in self.points(calls, every):
            self._begin_reload(policy, before)
            what = f"reload, {fault} {fault.at} {calls[fault.at]}"
            with self._hammering(what):
                self._reloaded(fault, RULES_B)
                proxy = scene.proxy
                assert isinstance(proxy, WatchedProxy)
                if proxy.watch.happened:
                    self.tried += 1
                if proxy.over():
                    if fault.error:
                        self.faults.append(f"{what}: the server has ended: {proxy.log[-5:]}")
                    proxy.end()
                    self._up()
                    self._compare(f"{what}, and a start", self._open_again(), after)
                else:
                    done = any(re.search(_RELOADED, line) for line in proxy.log)
                    self._compare(
                        f"{what} ({'done' if done else 'refused'})", self._open_again(), after if done else before
                    )
                    if any("Traceback" in line for line in proxy.log):
                        self.faults.append(f"{what}: a traceback: {proxy.log[-12:]}")
                    self._reloaded(None, RULES_B)
                    self._compare(f"{what}, and a reload", self._open_again(), after)
            self._no_strange_files(what)

    def _open_again(self) -> Verdicts:
        """What clients meet, when the gate lets anybody in: where it could not be told what guards a listener, that is
        shut until the next look."""
        return wait_for(self._unless_shut, timeout=60, what="that the listeners are open again")

    def _unless_shut(self) -> Verdicts | None:
        met = self.scene.connect_all()
        return None if met["failsafe"] == "silence" else met

    def _begin_reload(self, policy: Policy, before: Verdicts) -> None:
        self._configure(RULES_A)
        if self.scene.proxy.logged("Traceback") or len(self.scene.proxy.workers()) > 4:
            self.scene.crash()
            self._up()
        self.scene.put_back(policy)
        self._reloaded(None, RULES_A)
        assert self.scene.connect_all() == before

    def _reloaded(self, fault: Fault | None, rules: str) -> list[Call]:
        """Reload, and return the calls of it; it may have failed, or the server may have ended."""
        proxy = self.scene.proxy
        assert isinstance(proxy, WatchedProxy)
        self._configure(rules)
        proxy.log.clear()
        proxy.watch.arm(fault)
        proxy.signal(signal.SIGHUP)
        wait_for(
            lambda: proxy.logged(_RELOADED) or proxy.logged(_NOT_RELOADED) or proxy.over(),
            timeout=90,
            what="the reload",
        )
        return list(proxy.watch.calls)

    # -- stop ----------------------------------------------------------------------------------------------------

    def stop(self, *, every: int = 1, persist: bool) -> None:
        """``persist``: the policy is to stay pinned."""
        scene = self.scene
        self._configure(RULES_A, persist=persist)
        scene.crash()
        proxy = self._up()
        policy, wanted = self._saved(), scene.connect_all()
        calls = self._stopped(proxy, None)
        self._up()
        forgotten = scene.connect_all()  # unless the policy is to be kept, it may have gone, and not in part
        scene.crash()
        for fault in self.points(calls, every):
            proxy = self._up()
            scene.put_back(policy)
            self._compare("before a stop", scene.connect_all(), wanted)
            what = f"stop{' that keeps the policy' if persist else ''}, {fault} {fault.at} {calls[fault.at]}"
            with self._hammering(what):
                self._stopped(proxy, fault)
                if proxy.watch.happened:
                    self.tried += 1
            if fault.error:
                text = "\n".join(proxy.log[-12:])
                if "Traceback" in text:
                    self.faults.append(f"{what}: a traceback:\n{text}")
            self._nothing_left(what, fault, persist)
            if (persist or not fault.error) and scene.instance.pinned:
                self._up()
                self._compare(f"{what}, and a start", scene.connect_all(), wanted, forgotten)
                scene.crash()
        self._configure(RULES_A)
        self._up()
        scene.put_back(policy)

    @staticmethod
    def _stopped(proxy: WatchedProxy, fault: Fault | None) -> list[Call]:
        proxy.watch.arm(fault)
        proxy.signal(signal.SIGTERM)
        wait_for(proxy.over, timeout=30, what="the stop")
        calls = list(proxy.watch.calls)
        proxy.end()
        return calls

    def _nothing_left(self, what: str, fault: Fault, persist: bool) -> None:
        place = self.scene.instance
        left: list[object] = []
        if fault.error:
            left += [path for path in cgroup.own_cgroup().glob(f"{place.cgroup_name}*")]
            if not persist and place.pin_root.exists():
                left.append(place.pin_root)
        if left and not any("stay" in line or str(place.pin_root) in line for line in self.scene.proxy.log):
            self.faults.append(f"{what}: left, and nobody says so: {left}")
        if persist and not place.pinned:
            self.faults.append(f"{what}: the policy is lost")
        bpffs.ensure_mounted()

"""The verdict of the real BPF code for a frame, by BPF_PROG_TEST_RUN: nothing is attached anywhere."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType

from rama_ebpf.core.address import IPAddress, unmap
from rama_ebpf.kernel import abi, bpf, bpffs
from rama_ebpf.kernel.bpf import AttachType
from rama_ebpf.kernel.bytecode import Program
from rama_ebpf.kernel.compile import Unit, amalgamate
from rama_ebpf.kernel.gate_maps import GateMaps, MapSizes
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.kernel.programs import load_programs
from rama_ebpf.loader import unload
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.rule import Action, Stage, Verdict

__all__ = ["Parsed", "Probe", "listen"]

_XDP, _XDP_TX = 6, 3
_RESULT = struct.Struct(f"=5I {abi.PACKET.size}s I")
_KINDS = ("tcp", "other", "malformed")


@dataclass(frozen=True)
class Parsed:
    """What the parser made of a frame, and the verdict on it (None unless ``kind`` is ``tcp``)."""

    kind: str
    source: IPAddress
    target: IPAddress
    port: int
    syn: bool
    verdict: Verdict | None


class Probe:
    """Maps and programs of an instance of its own, judged by test runs. A context manager."""

    def __init__(
        self,
        instance: Instance,
        sizes: MapSizes | None = None,
        *extra: Program,
        source: Path | None = None,
        defines: tuple[str, ...] = (),
        maps: Mapping[str, int] | None = None,
    ) -> None:
        """Load ``extra`` programs of the unit, and of ``source`` if it is given, beside the probe.

        ``maps`` are those of ``source``.
        """
        bpffs.ensure_mounted()
        self.instance = instance
        instance.pin_dir.mkdir(parents=True, mode=0o700)
        self.maps = GateMaps.create(instance.pin_dir, sizes or MapSizes(rules=4096, bans=4096, buckets=4096))
        self.store = KernelStore(instance, self.maps)
        text = amalgamate(abi.source_dir() / "sockops_filter.c")
        text += Path(__file__).with_name("verdict_probe.c").read_text(encoding="utf-8")
        if source is not None:
            text += source.read_text(encoding="utf-8")
        programs = (Program("probe_frame", _XDP, AttachType.XDP), *extra)
        try:
            self.programs = load_programs(Unit(text, programs, defines), {**self.maps, **(maps or {})})
        except BaseException:
            self.maps.close()
            unload(instance)
            raise
        self._names: dict[int, str] = {}

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self.programs.values():
            os.close(fd)
        self.maps.close()
        unload(self.instance)

    def judge(self, frame: bytes) -> Parsed:
        """Parse and judge a frame."""
        code, _, out, _ = bpf.prog_test_run(
            self.programs["probe_frame"], frame, output=len(frame) + _RESULT.size, repeat=1
        )
        assert code == _XDP_TX, f"the probe returned {code}"
        action, stage, rule, dry_action, dry_rule, packet, kind = _RESULT.unpack_from(out)
        source, target, port, _, syn, *_ = abi.PACKET.unpack(packet)
        verdict = None
        if _KINDS[kind] == "tcp":
            fixed = {Stage.BAN: "ban", Stage.DEFAULT: "default"}
            name = self._name(rule) if rule else fixed.get(Stage(stage), "")
            dry_name = self._name(dry_rule) if dry_rule else ""
            verdict = Verdict(Action(action), Stage(stage), name, dry_name, Action(dry_action))
        return Parsed(_KINDS[kind], unmap(IPv6Address(source)), unmap(IPv6Address(target)), port, bool(syn), verdict)

    def _name(self, rule_id: int) -> str:
        if rule_id not in self._names:
            rule = self.store.tables.rules.get(rule_id)
            assert rule is not None, f"the verdict names rule {rule_id}, which is not there"
            self._names[rule_id] = rule.name
        return self._names[rule_id]

    def rules_changed(self) -> None:
        """Forget rules' names: ids are given again."""
        self._names.clear()


@contextmanager
def listen(
    probe: Probe, port: int, *, at: Sequence[IPAddress] = (), sockets: int = 0, answers: bool = False
) -> Iterator[None]:
    """Put a port under the gate, on any address or on those given. The first ``sockets`` of the SOCKMAP serve it.
    ``answers``: XDP may send.

    Test runs seem to come in by the loopback device, whose hardware address is zero, as in the frames that they are
    given.
    """
    bpf.map_update(probe.maps["interfaces"], (1).to_bytes(4, sys.byteorder), abi.INTERFACE.pack(bytes(6), answers))
    addresses = at or (IPv6Address("::"), IPv4Address("0.0.0.0"))
    mapped = [IPv6Address(f"::ffff:{address}") if address.version == 4 else address for address in addresses]
    keys = [abi.LISTENER_KEY.pack(address.packed, port, 0) for address in mapped]
    for key in keys:
        bpf.map_update(probe.maps["listeners"], key, abi.LISTENER.pack(0, sockets, abi.constants()["LISTENER_OPEN"]))
    try:
        yield
    finally:
        for key in keys:
            bpf.map_delete(probe.maps["listeners"], key)

"""A listener is guarded, or it is not open: whatever becomes of cgroups, links, interfaces, addresses and pins."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from rama_ebpf.core.address import mapped
from rama_ebpf.kernel import abi, bpf, cgroup
from rama_ebpf.kernel.attachments import HOOKS
from rama_ebpf.kernel.bpf import MapType
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess, rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT, SECOND = 1080, 1081
STACK = "[stacks.echo]\nservice = {echo = {}}\n"


class Scene:
    """A server with a configuration that a test changes, an allowed client, and one that is denied."""

    def __init__(self, lab: Lab, start_proxy: StartProxy, directory: Path) -> None:
        self.server, self.allowed, self.denied = lab.host("proxy"), lab.host("allowed"), lab.host("denied")
        self.file = directory / "rama.toml"
        self._start = start_proxy
        self.proxy: ProxyProcess

    def write(self, *addresses: str, optional: bool = False, policy: str = "") -> None:
        gate = 'gate = "optional"\n' if optional else ""
        listeners = [
            f'[listeners.l{number}]\naddress = "{address}"\nstack = "echo"\n{gate}'
            for number, address in enumerate(addresses)
        ]
        server = '[server]\nworkers = 2\ndrain = "1s"\nmetrics = "127.0.0.1:9464"\n'
        sources = f'sources = ["{self.denied.ipv4}", "{self.denied.ipv6}"]'
        rule = f'[[policy.rules]]\nname = "denied"\naction = "drop"\n{sources}\n'
        self.file.write_text("".join(listeners) + server + STACK + f"[policy]\n{policy}\n" + rule)

    def start(self, *addresses: str, policy: str = "") -> None:
        self.write(*addresses, policy=policy)
        self.proxy = self._start(self.server, "--config", str(self.file))

    def reload(self, *addresses: str, optional: bool = False) -> None:
        self.write(*addresses, optional=optional)
        before = self.reloads()
        self.proxy.signal(signal.SIGHUP)
        wait_for(lambda: self.reloads() > before, timeout=60, what="the reload")

    def reloads(self) -> int:
        return sum(line.endswith(": reloaded") for line in self.proxy.log)

    def gets_in(self, client: Host, address: str, port: int = PORT) -> bool:
        """Whether a client is served."""
        with contextlib.suppress(OSError), client.connect(address, port, timeout=1) as sock:
            sock.sendall(b"hello")
            return sock.recv(5) == b"hello"
        return False

    def is_guarded(self, address: str, port: int = PORT) -> bool:
        """Whether the allowed client is served and the denied one is not, as the policy says."""
        return self.gets_in(self.allowed, address, port) and not self.gets_in(self.denied, address, port)

    def guards(self) -> dict[str, str]:
        return {row["address"]: row["guard"] for row in self.proxy.json("status")["listeners"]}

    def logged(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.proxy.log)


@pytest.fixture
def scene(lab: Lab, start_proxy: StartProxy, tmp_path: Path) -> Scene:
    return Scene(lab, start_proxy, tmp_path)


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A cgroup of somebody else."""
    made = cgroup.own_cgroup() / f"elsewhere-{os.getpid()}"
    made.mkdir()
    yield made
    wait_for(lambda: "populated 0" in (made / "cgroup.events").read_text(), what="the end of its processes")
    for child in sorted(made.glob("**/"), reverse=True):
        child.rmdir()


def move(pid: int, directory: Path) -> None:
    (directory / "cgroup.procs").write_text(str(pid))


def ready(host: Host) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        try:
            with urllib.request.urlopen("http://127.0.0.1:9464/ready", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return host.call(ask)


def metric(host: Host, name: str) -> float:
    def scrape() -> str:
        with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=10) as response:
            return str(response.read().decode())

    found = re.search(rf"^{re.escape(name)} (\S+)$", host.call(scrape), flags=re.M)
    return float(found[1]) if found else 0.0


def test_status_test_doctor_and_ready_say_by_what_each_listener_is_guarded(scene: Scene) -> None:
    host = scene.server
    scene.start(f"{host.ipv4}:{PORT}", f"[{host.ipv6}]:{PORT}", policy='xdp = ["eth0"]')
    by = "guarded by cgroup, sk_lookup, XDP on eth0"
    assert scene.guards() == {f"{host.ipv4}:{PORT}": by, f"[{host.ipv6}]:{PORT}": by}
    assert scene.proxy.command("status").stdout.count(by) == 2
    assert f"{host.ipv4}:{PORT} is {by}" in scene.proxy.command("test", scene.denied.ipv4, check=False).stdout
    findings = scene.proxy.json("doctor", check=False)["findings"]
    assert [row["ok"] for row in findings if row["subject"].startswith("gate of instance")] == [True]
    assert ready(host) == (200, "ready\n")
    assert metric(host, "rama_ready") == 1
    assert all(scene.is_guarded(address) for address in (host.ipv4, host.ipv6))


def test_listener_added_after_the_server_was_moved_to_another_cgroup_is_guarded(elsewhere: Path, scene: Scene) -> None:
    host = scene.server
    scene.start(f"{host.ipv4}:{PORT}")
    first = Path(scene.proxy.json("status")["cgroup"])
    move(scene.proxy.pid, elsewhere)
    scene.reload(f"{host.ipv4}:{PORT}", f"{host.ipv4}:{SECOND}")
    assert all(guard.startswith("guarded by cgroup") for guard in scene.guards().values())
    assert scene.is_guarded(host.ipv4, PORT)
    assert scene.is_guarded(host.ipv4, SECOND)
    assert scene.logged("the server was moved from") == 1
    assert Path(scene.proxy.json("status")["cgroup"]).parent == elsewhere
    wait_for(lambda: scene.proxy.json("status") and not first.exists(), timeout=30, what="the end of the first cgroup")
    assert scene.is_guarded(host.ipv4, SECOND)


def test_listener_of_a_cgroup_that_the_gate_cannot_reach_is_not_open(elsewhere: Path, scene: Scene) -> None:
    host = scene.server
    scene.start(f"{host.ipv4}:{PORT}")
    (elsewhere / "cgroup.max.descendants").write_text("0")  # nobody makes cgroups there
    move(scene.proxy.pid, elsewhere)
    scene.reload(f"{host.ipv4}:{PORT}", f"{host.ipv4}:{SECOND}")
    guards = scene.guards()
    assert "NOT GUARDED: its socket belongs to cgroup" in guards[f"{host.ipv4}:{SECOND}"]
    assert (
        "where the gate is not attached"
        in scene.proxy.command("test", f"{scene.denied.ipv4}:{SECOND}", check=False).stdout
    )
    for client in (scene.allowed, scene.denied):
        assert not scene.gets_in(client, host.ipv4, SECOND)
        assert not scene.gets_in(client, host.ipv4, PORT)  # its sockets are new ones, too
    assert "CLOSED, NOT GUARDED" in scene.proxy.command("status").stdout
    assert scene.logged(f"listener {host.ipv4}:{SECOND}: CLOSED") == 1
    doctor = scene.proxy.command("doctor", check=False)
    assert doctor.returncode == 3
    assert "DOES NOT GUARD" in doctor.stdout
    code, text = ready(host)
    assert code == 503
    assert f"{host.ipv4}:{SECOND}: its socket belongs to cgroup" in text
    assert metric(host, "rama_ready") == 0

    scene.reload(f"{host.ipv4}:{PORT}", optional=True)  # the operator wrote that it may
    assert scene.gets_in(scene.allowed, host.ipv4)
    assert scene.guards()[f"{host.ipv4}:{PORT}"].endswith("(gate is optional)")

    (elsewhere / "cgroup.max.descendants").write_text("max")
    scene.reload(f"{host.ipv4}:{PORT}", f"{host.ipv4}:{SECOND}")
    assert scene.is_guarded(host.ipv4, PORT)
    assert scene.is_guarded(host.ipv4, SECOND)
    assert ready(host)[0] == 200


def test_listener_of_a_cgroup_that_could_not_be_reached_opens_by_itself_when_it_can(
    elsewhere: Path, scene: Scene
) -> None:
    host = scene.server
    scene.start(f"{host.ipv4}:{PORT}")
    (elsewhere / "cgroup.max.descendants").write_text("0")
    move(scene.proxy.pid, elsewhere)
    scene.reload(f"{host.ipv4}:{PORT}")
    assert "NOT GUARDED" in scene.guards()[f"{host.ipv4}:{PORT}"]
    (elsewhere / "cgroup.max.descendants").write_text("max")
    wait_for(lambda: scene.gets_in(scene.allowed, host.ipv4), timeout=60, what="that the listener opens")
    assert scene.is_guarded(host.ipv4)
    assert scene.proxy.json("status")["problems"] == {}
    assert ready(host)[0] == 200
    scene.reload(f"{host.ipv4}:{PORT}")
    assert scene.is_guarded(host.ipv4)
    # Else sockets of ours would be judged, and charged, twice.
    wait_for(lambda: scene.proxy.json("status") and not judges(elsewhere), timeout=30, what="one gate for each socket")


def judges(directory: Path) -> bool:
    """Whether what judges connections is attached to this very cgroup."""
    listed = subprocess.run(["bpftool", "cgroup", "show", directory], check=True, capture_output=True, text=True).stdout
    return any(line.split()[-1:] == ["gate_cgroup"] for line in listed.splitlines())


def test_removed_cgroup_is_replaced_and_everything_stays_guarded(elsewhere: Path, scene: Scene) -> None:
    host = scene.server
    scene.start(f"{host.ipv4}:{PORT}")
    first = Path(scene.proxy.json("status")["cgroup"])
    for directory in (first, first / "workers"):
        for pid in (directory / "cgroup.procs").read_text().split():
            move(int(pid), elsewhere)
    (first / "workers").rmdir()
    first.rmdir()
    assert scene.guards() == {f"{host.ipv4}:{PORT}": "guarded by cgroup, sk_lookup"}
    assert scene.is_guarded(host.ipv4)
    scene.reload(f"{host.ipv4}:{PORT}", f"{host.ipv4}:{SECOND}")
    assert scene.is_guarded(host.ipv4)
    assert scene.is_guarded(host.ipv4, SECOND)
    now = Path(scene.proxy.json("status")["cgroup"])
    scene.proxy.signal(signal.SIGTERM)
    assert scene.proxy.wait() == 0
    assert not now.exists()


def test_worker_that_was_moved_is_put_back_under_the_egress_policy(elsewhere: Path, scene: Scene) -> None:
    scene.start(f"{scene.server.ipv4}:{PORT}")
    home = Path(scene.proxy.json("status")["cgroup"]) / "workers"
    moved, _ = scene.proxy.workers()
    move(moved, elsewhere)
    assert scene.proxy.json("status")["problems"] == {}
    assert str(moved) in (home / "cgroup.procs").read_text().split()
    assert scene.logged(f"worker {moved} was moved to {elsewhere}: moved back") == 1


def links(pid: int) -> dict[str, int]:
    """The ids of the links that a process holds, by the names of their programs."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/fdinfo").iterdir()]
    held = {
        int(one[1]): int(two[1])
        for text in texts
        if (one := re.search(r"link_id:\s+(\d+)", text)) and (two := re.search(r"prog_id:\s+(\d+)", text))
    }
    listed = subprocess.run(["bpftool", "prog", "list"], check=True, capture_output=True, text=True).stdout
    names = {int(number): name for number, name in re.findall(r"^(\d+): \S+  name (\S+)", listed, flags=re.M)}
    return {names[program]: link for link, program in held.items() if program in names}


def test_links_that_are_lost_are_put_back_logged_once_and_counted(scene: Scene) -> None:
    host = scene.server
    scene.start(f"{host.ipv4}:{PORT}", policy='xdp = ["eth0"]')
    held = links(scene.proxy.pid)
    assert {"gate_cgroup", "gate_lookup", "gate_xdp"} <= held.keys()
    for link in held.values():
        subprocess.run(["bpftool", "link", "detach", "id", str(link)], check=True)
    assert scene.guards() == {f"{host.ipv4}:{PORT}": "guarded by cgroup, sk_lookup, XDP on eth0"}
    assert links(scene.proxy.pid).keys() == held.keys()
    assert scene.is_guarded(host.ipv4)
    scene.proxy.json("status")
    assert scene.logged("gate_cgroup was detached from .*: attached again") == 1
    assert scene.logged("gate_lookup was detached from the network namespace: attached again") == 1
    assert scene.logged("XDP on eth0: attached again, native") == 1
    assert metric(host, 'rama_gate_losses_total{hook="cgroup"}') >= 1
    assert metric(host, 'rama_gate_losses_total{hook="sk_lookup"}') == 1
    assert scene.proxy.json("status")["problems"] == {}


def test_another_program_in_a_link_of_ours_is_replaced_and_counted(scene: Scene) -> None:
    host = scene.server
    scene.start(f"{host.ipv4}:{PORT}", policy='xdp = ["eth0"]')
    passes = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)  # r0 = 1; exit
    kinds = {hook.name[:15]: hook for hook in HOOKS}  # as the kernel has it
    for name, link in links(scene.proxy.pid).items():
        program = bpf.prog_load(kinds[name].prog_type, passes, kinds[name].attach_type, "foreign")
        held = bpf.link_by_id(link)
        try:
            bpf.link_update(held, program)
        finally:
            bpf.close(held)
            bpf.close(program)
    assert links(scene.proxy.pid).keys() == {"foreign"}
    assert scene.guards() == {f"{host.ipv4}:{PORT}": "guarded by cgroup, sk_lookup, XDP on eth0"}
    assert {"gate_cgroup", "gate_lookup", "gate_xdp", "egress_connect4"} <= links(scene.proxy.pid).keys()
    assert scene.is_guarded(host.ipv4)
    assert scene.logged("another program was put in place of gate_cgroup at .*: put back") == 1
    assert scene.logged("another program was put in place of gate_lookup in the network namespace: put back") == 1
    assert scene.proxy.json("status")["problems"] == {}


def test_xdp_is_back_when_a_deleted_interface_is_made_again(scene: Scene) -> None:
    host = scene.server
    host.ip("link", "add", "veth8", "type", "veth", "peer", "name", "veth9")
    scene.start(f"{host.ipv4}:{PORT}", policy='xdp = ["eth0", "veth8"]')
    host.ip("link", "delete", "veth8")
    wait_for(lambda: scene.logged("XDP on veth8: it was removed"), what="the loss")
    wait_for(lambda: scene.logged("gate: XDP on veth8: there is no interface 'veth8'"), what="the problem")
    assert ready(host)[0] == 503
    assert scene.guards() == {f"{host.ipv4}:{PORT}": "guarded by cgroup, sk_lookup, XDP on eth0"}
    doctor = scene.proxy.command("doctor", check=False)
    assert doctor.returncode == 3
    assert "XDP on veth8: there is no interface" in doctor.stdout
    host.ip("link", "add", "veth8", "type", "veth", "peer", "name", "veth9")
    wait_for(lambda: scene.logged("XDP on veth8: attached again"), what="XDP on the new interface")
    assert {row["interface"]: row["mode"] for row in scene.proxy.json("status")["xdp"]}["veth8"] == "native"
    assert ready(host)[0] == 200
    assert scene.logged("XDP on veth8: it was removed") == 1


def test_interface_that_went_to_another_namespace_drops_nothing_there_and_gets_xdp_when_it_is_back(
    scene: Scene, lab: Lab
) -> None:
    host, other = scene.server, lab.host("other")
    host.ip("link", "add", "veth8", "type", "veth", "peer", "name", "veth9", "netns", scene.denied.netns)
    scene.denied.ip("link", "set", "veth9", "up")
    scene.denied.add_address("198.19.9.2/24", "veth9")
    scene.start(f"0.0.0.0:{PORT}", policy='xdp = ["veth8"]')
    scene.proxy.command("block", "198.19.9.2")
    host.ip("link", "set", "veth8", "netns", other.netns)
    other.ip("link", "set", "veth8", "up")
    other.add_address("198.19.9.1/24", "veth8")
    wait_for(lambda: scene.logged("veth8: the interface went to another network namespace"), what="the loss")
    assert "xdp" not in other.run("ip", "link", "show", "dev", "veth8").stdout
    with other.socket() as service:
        service.bind(("198.19.9.1", PORT))
        service.listen()
        scene.denied.connect("198.19.9.1", PORT).close()
    assert ready(host)[0] == 503
    other.ip("link", "set", "veth8", "netns", host.netns)
    wait_for(lambda: scene.logged("XDP on veth8: attached again"), what="XDP on the interface that is back")
    assert ready(host)[0] == 200


def test_address_that_appears_later_is_guarded_on_a_wildcard_listener(scene: Scene) -> None:
    host = scene.server
    scene.start(f"0.0.0.0:{PORT}", f"[::]:{PORT}", policy='xdp = ["eth0"]')
    host.add_address("198.18.200.1/16", "eth0")
    host.add_address("2001:db8::200/64", "eth0")
    assert scene.is_guarded("198.18.200.1")
    assert scene.is_guarded("2001:db8::200")


def test_wildcard_beside_specific_and_a_second_family_are_guarded_each_and_rebinding_opens_nothing(
    scene: Scene,
) -> None:
    host = scene.server
    scene.start(f"0.0.0.0:{PORT}")
    assert not scene.gets_in(scene.allowed, host.ipv6)  # nobody listens there
    for addresses in (
        (f"0.0.0.0:{PORT}", f"{host.ipv4}:{PORT}"),
        (f"0.0.0.0:{PORT}", f"[::]:{PORT}"),
        (f"{host.ipv4}:{PORT}", f"[{host.ipv6}]:{PORT}"),
        (f"{host.ipv4}:{SECOND}", f"[::]:{PORT}"),
        (f"{host.ipv4}:{PORT}", f"[::]:{SECOND}"),
    ):
        scene.reload(*addresses)
        guards = scene.guards()
        assert set(guards.values()) == {"guarded by cgroup, sk_lookup"}, guards
        for address in addresses:
            ip, port = host.ipv6 if "[" in address else host.ipv4, int(address.rpartition(":")[2])
            # A specific address that is left answers RST until no old worker has it any more.
            wait_for(lambda ip=ip, port=port: scene.gets_in(scene.allowed, ip, port), timeout=60, what=address)
        for ip in (host.ipv4, host.ipv6):
            assert not any(scene.gets_in(scene.denied, ip, port) for port in (PORT, SECOND)), (addresses, ip)


def test_lost_bpffs_and_pins_are_put_back_with_the_policy(scene: Scene, instance: str) -> None:
    place = Instance(instance)
    scene.start(f"{scene.server.ipv4}:{PORT}")
    scene.proxy.command("block", scene.allowed.ipv4)
    for pin in place.pin_dir.iterdir():
        pin.unlink()
    assert scene.proxy.json("status")["problems"] == {}
    assert scene.proxy.json("test", scene.allowed.ipv4, check=False)["action"] == "drop"
    scene.proxy.command("unblock", scene.allowed.ipv4)
    assert scene.is_guarded(scene.server.ipv4)
    assert scene.logged("the policy was not pinned at .*: pinned again") == 1
    (place.pin_dir / "bans").unlink()
    foreign = bpf.map_create(MapType.HASH, 4, 4, 1)
    bpf.obj_pin(foreign, str(place.pin_dir / "bans"))
    bpf.close(foreign)
    assert scene.proxy.json("status")["problems"] == {}
    scene.proxy.command("ban", scene.allowed.ipv4)
    assert not scene.gets_in(scene.allowed, scene.server.ipv4)


def test_entries_that_somebody_else_wrote_shut_and_open_nothing_for_long(scene: Scene, instance: str) -> None:
    host, place = scene.server, Instance(instance)
    scene.start(f"{host.ipv4}:{PORT}")
    listeners = bpf.obj_get(str(place.pin_dir / "listeners"))
    try:
        ours = abi.LISTENER_KEY.pack(mapped(ip_address(host.ipv4)), PORT, 0)
        ssh = abi.LISTENER_KEY.pack(mapped(ip_address(host.ipv4)), 22, 0)
        bpf.map_update(listeners, ssh, abi.LISTENER.pack(5, 0, 0))
        bpf.map_delete(listeners, ours)
        assert scene.proxy.json("status")["problems"] == {}
        assert bpf.map_lookup(listeners, ssh, abi.LISTENER.size) is None
    finally:
        bpf.close(listeners)
    assert scene.is_guarded(host.ipv4)
    assert scene.logged(f"the gate's entry of {host.ipv4}:{PORT} was not as it was meant: put back") == 1


def test_whatever_else_the_programs_go_by_is_put_back_counted_and_said(scene: Scene, instance: str) -> None:
    """Slots, the cgroup without egress policy, the rate of RST, and what XDP is told of interfaces."""
    host, place = scene.server, Instance(instance)
    scene.start(f"{host.ipv4}:{PORT}")
    rows = {
        "sockets": ((0).to_bytes(4, "little"), 8),
        "server_cgroup": (bytes(4), 8),
        "reject_meter": (bytes(4), abi.REJECT_METER.size),
    }
    with contextlib.ExitStack() as opened:
        maps = {}
        for name in ("interfaces", "listeners", *rows):
            maps[name] = bpf.obj_get(str(place.pin_dir / name))
            opened.callback(bpf.close, maps[name])
        raw = bpf.map_lookup(maps["listeners"], abi.LISTENER_KEY.pack(mapped(ip_address(host.ipv4)), PORT, 0), 8)
        assert raw is not None
        first = abi.LISTENER.unpack(raw)[0] * abi.constants()["SOCKETS_PER_LISTENER"]
        rows["sockets"] = first.to_bytes(4, sys.byteorder), 8
        before = {name: bpf.map_lookup(maps[name], *row) for name, row in rows.items()}
        bpf.map_delete(maps["sockets"], rows["sockets"][0])
        bpf.map_update(maps["server_cgroup"], bytes(4), (1).to_bytes(8, sys.byteorder))
        bpf.map_update(maps["reject_meter"], bytes(4), bytes(abi.REJECT_METER.size))
        bpf.map_update(maps["interfaces"], (77).to_bytes(4, sys.byteorder), abi.INTERFACE.pack(bytes(6), 1))
        assert scene.proxy.json("status")["problems"] == {}
        after = {name: bpf.map_lookup(maps[name], *row) for name, row in rows.items()}
        assert bpf.map_lookup_batch(maps["interfaces"], 4, abi.INTERFACE.size) == []
    limit = 16  # what RST were sent meanwhile is counted behind it
    assert {name: value and value[:limit] for name, value in after.items()} == {
        name: value and value[:limit] for name, value in before.items()
    }
    assert scene.is_guarded(host.ipv4)
    for hook in ("listeners", "egress", "rejects", "xdp"):
        assert metric(host, f'rama_gate_losses_total{{hook="{hook}"}}') == 1.0, hook


# -- one address, one owner -------------------------------------------------------------------------------------------


@pytest.fixture
def second() -> Iterator[str]:
    name = f"test-second-{os.getpid()}"
    yield name
    wait_for(lambda: Instance(name).serving_pid() is None, what="the end of the second server")
    unload(Instance(name))


@pytest.mark.parametrize(("first", "then"), [("0.0.0.0", "198.18.0.1"), ("198.18.0.1", "0.0.0.0"), ("198.18.0.1",) * 2])
def test_address_that_another_instance_serves_is_refused(
    lab: Lab, start_proxy: StartProxy, second: str, first: str, then: str
) -> None:
    host = lab.host("proxy")
    proxy = start_proxy(host, "--listen", f"{first}:{PORT}")
    arguments = ("run", "--instance", second, "--listen", f"{then}:{PORT}")
    refused = host.run(ProxyProcess.COMMAND, *arguments, check=False)
    assert refused.returncode == 3
    assert f"cannot listen on {then} port {PORT}: " in refused.stderr
    assert f"process {proxy.pid} (" in refused.stderr
    assert f"listens at {first}:{PORT}" in refused.stderr


@pytest.mark.parametrize("address", ["0.0.0.0", "198.18.0.1", "::"])
def test_address_that_somebody_shares_with_all_of_its_user_is_refused(lab: Lab, second: str, address: str) -> None:
    host = lab.host("proxy")
    with host.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as foreign:
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        foreign.bind((address, PORT))
        foreign.listen()
        arguments = ("run", "--instance", second, "--listen", f"{host.ipv4}:{PORT}")
        refused = host.run(ProxyProcess.COMMAND, *arguments, check=False)
    assert refused.returncode == 3
    assert f"process {os.getpid()} (" in refused.stderr


def test_address_that_somebody_comes_to_share_is_said_until_it_ends(scene: Scene) -> None:
    host = scene.server
    scene.start(f"0.0.0.0:{PORT}")
    with host.socket() as foreign:
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        foreign.bind((host.ipv4, PORT))
        foreign.listen()
        (text,) = scene.proxy.json("status")["problems"].values()
        assert text.startswith(f"process {os.getpid()} (")
        assert f"listens at {host.ipv4}:{PORT}, too" in text
        assert ready(host)[0] == 503
    assert scene.proxy.json("status")["problems"] == {}
    assert scene.is_guarded(host.ipv4)


def test_check_names_the_instance_that_serves_an_address(lab: Lab, start_proxy: StartProxy, tmp_path: Path) -> None:
    host = lab.host("proxy")
    proxy = start_proxy(host, "--listen", f"0.0.0.0:{PORT}")
    file = tmp_path / "rama.toml"
    file.write_text(f'[listeners.main]\naddress = "{host.ipv4}:{PORT}"\nstack = "echo"\n{STACK}')
    said = host.run(ProxyProcess.COMMAND, "check", str(file))
    assert said.stderr.count(f"{host.ipv4}:{PORT} is taken: process {proxy.pid} (") == 1
    assert rama_ebpf("check", str(file)).stderr == ""  # it is free in this namespace


def test_a_server_that_stops_is_not_ready_though_it_serves_what_it_has(scene: Scene) -> None:
    """So a balancer sends new clients elsewhere."""
    host = scene.server
    scene.start(f"{host.ipv4}:{PORT}")
    scene.file.write_text(scene.file.read_text().replace('drain = "1s"', 'drain = "60s"'))
    scene.proxy.signal(signal.SIGHUP)
    wait_for(lambda: scene.reloads() == 1, timeout=60, what="the reload")
    with scene.allowed.connect(host.ipv4, PORT) as live:
        live.sendall(b"hello")
        assert live.recv(5) == b"hello"
        scene.proxy.signal(signal.SIGTERM)
        wait_for(lambda: ready(host) == (503, "stop: the server stops\n"), what="that it is not ready")
        live.sendall(b"still")
        assert live.recv(5) == b"still"

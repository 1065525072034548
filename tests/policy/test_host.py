"""The policy belongs to the host: whatever becomes of server and pins, the next start has it, until it is unloaded."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rama_ebpf.kernel import abi, bpf, bpffs
from rama_ebpf.kernel.gate_maps import GateMaps
from rama_ebpf.kernel.gate_state import GateState
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.rule import Action

from ..conftest import StartProxy
from ..lab import Host, Lab
from ..proxy import ProxyProcess, rama_ebpf
from .test_server import PORT, answered, shut_out

pytestmark = [pytest.mark.root, pytest.mark.ebpf]


def _stop(proxy: ProxyProcess) -> None:
    proxy.signal(signal.SIGTERM)
    assert proxy.wait() == 0


def _kill(proxy: ProxyProcess) -> None:
    proxy.signal(signal.SIGKILL)
    proxy.wait()


def _pin(instance: Instance, name: str) -> Path:
    return instance.pin_dir / name


def _lose_a_pin(proxy: ProxyProcess) -> None:
    _kill(proxy)
    _pin(Instance(proxy.instance), "slots").unlink()


def _lose_all_pins(proxy: ProxyProcess) -> None:
    _kill(proxy)
    bpffs.remove_tree(Instance(proxy.instance).pin_root)


def _swap_pins(proxy: ProxyProcess) -> None:
    """As if another program, or version, had pinned maps of another layout."""
    _kill(proxy)
    place = Instance(proxy.instance)
    _pin(place, "rules").rename(_pin(place, "x"))
    _pin(place, "bans").rename(_pin(place, "rules"))
    _pin(place, "x").rename(_pin(place, "bans"))


def _another_version(proxy: ProxyProcess) -> None:
    _kill(proxy)
    place = Instance(proxy.instance)
    place.pin_dir.rename(place.pin_root / "layout-1")


def _pins_of_another_instance(proxy: ProxyProcess) -> None:
    """As if they had been moved here: they let everybody in."""
    _kill(proxy)
    place = Instance(proxy.instance)
    with GateMaps.open(place.pin_dir) as maps:
        sizes = maps.sizes
    bpffs.remove_tree(place.pin_dir)
    place.pin_dir.mkdir()
    GateMaps.create(place.pin_dir, sizes, "another").close()


def _record_of_another_program(proxy: ProxyProcess) -> None:
    """Somebody has written into the record that everybody is to be let in."""
    _kill(proxy)
    with GateMaps.open(Instance(proxy.instance).pin_dir) as maps:
        raw = bpf.map_lookup(maps["gate"], bytes(4), abi.GATE.size)
        assert raw is not None
        gate = GateState.unpack(raw)
        heads = tuple(replace(head, default=int(Action.ALLOW)) for head in gate.sets)
        changed = replace(gate, sets=heads, flags=0, revision=1 << 63)  # type: ignore[arg-type]
        bpf.map_update(maps["gate"], bytes(4), changed.pack()[:-8] + raw[-8:])


ENDS: dict[str, Callable[[ProxyProcess], None]] = {
    "clean stop": _stop,
    "kill": _kill,
    "one pin lost": _lose_a_pin,
    "all pins lost": _lose_all_pins,
    "pins of another layout": _swap_pins,
    "pins of another version": _another_version,
    "pins of another instance": _pins_of_another_instance,
    "a record that another program wrote": _record_of_another_program,
}


@pytest.fixture
def hosts(lab: Lab) -> tuple[Host, Host, Host, Host]:
    return lab.host("proxy"), lab.host("client"), lab.host("other"), lab.host("operator")


@pytest.mark.parametrize("end", ENDS)
def test_the_next_start_has_the_whole_policy(
    hosts: tuple[Host, Host, Host, Host], start_proxy: StartProxy, tmp_path: Path, end: str
) -> None:
    server, client, other, operator = hosts
    listen = ("--listen", f"{server.ipv4}:{PORT}")
    proxy = start_proxy(server, *listen, "--failsafe", operator.ipv4)
    policy = tmp_path / "policy.toml"
    policy.write_text(
        f'default = "drop"\n[[rules]]\nname = "office"\naction = "allow"\nsources = ["{client.ipv4}/32"]\n'
    )
    proxy.command("policy", "load", str(policy))
    proxy.command("allow", other.ipv4, "--ttl", "1h", "--reason", "a guest")
    proxy.command("block", "198.18.77.0/24", "--port", "443", "--dry-run")
    proxy.command("ban", "198.18.78.1")
    before = proxy.json("list")
    ENDS[end](proxy)

    proxy = start_proxy(server, *listen, "--max-rules", "1000")
    assert all(answered(host, server.ipv4) for host in (client, other, operator))
    after = proxy.json("list")
    assert after["revision"] >= before["revision"]
    for row in (*before["rules"], *after["rules"], *before["bans"], *after["bans"]):
        for changing in ("hits", "dry_hits", "created", "expires_in"):
            row.pop(changing, None)
    kept = ("default", "failsafe", "rules", "bans")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    proxy.command("unblock", other.ipv4)
    assert shut_out(other, server.ipv4)
    state = Instance(proxy.instance).state_dir
    said = [line for line in proxy.log if f"is in force again as it is kept in {state}, revision" in line]
    assert len(said) == (end != "kill"), proxy.log
    assert proxy.logged("cannot be used and are replaced") == (end not in ("clean stop", "kill", "all pins lost"))


def test_commands_name_a_pin_that_is_missing_and_say_what_to_do(
    hosts: tuple[Host, Host, Host, Host], start_proxy: StartProxy
) -> None:
    server = hosts[0]
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}")
    proxy.command("block", "198.18.77.0/24")
    _lose_a_pin(proxy)
    for command in (("block", "198.18.1.1"), ("list",), ("test", "198.18.1.1")):
        failed = rama_ebpf(*command, "--instance", proxy.instance, check=False)
        assert failed.returncode == 2
        assert "there is no pin: " in failed.stderr
        assert "/slots'" in failed.stderr
        assert "the next start rebuilds them from disk" in failed.stderr


def test_unload_forgets_the_policy_but_no_ban(hosts: tuple[Host, Host, Host, Host], start_proxy: StartProxy) -> None:
    server, client, other, _ = hosts
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", "--default", "drop")
    proxy.command("block", client.ipv4)
    proxy.command("ban", other.ipv4)
    proxy.command("unload", "--stop")
    assert proxy.wait() == 0
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}")
    assert answered(client, server.ipv4)
    assert shut_out(other, server.ipv4)
    assert proxy.json("list")["rules"] == []


def test_a_start_that_fails_changes_nothing_on_disk(
    hosts: tuple[Host, Host, Host, Host], start_proxy: StartProxy
) -> None:
    server, client = hosts[:2]
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}")
    proxy.command("block", client.ipv4)
    _stop(proxy)
    state = Instance(proxy.instance).state_dir
    before = {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()}
    with server.socket() as taken:
        taken.bind((server.ipv4, PORT))
        taken.listen()
        with pytest.raises(AssertionError, match="the proxy ended"):
            start_proxy(server, "--listen", f"{server.ipv4}:{PORT}")
    assert {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()} == before
    assert not Instance(proxy.instance).pinned
    start_proxy(server, "--listen", f"{server.ipv4}:{PORT}")
    assert shut_out(client, server.ipv4)


def test_a_full_disk_is_told_by_the_exit_code_and_nothing_is_changed(
    hosts: tuple[Host, Host, Host, Host], start_proxy: StartProxy
) -> None:
    server, client = hosts[:2]
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}")
    proxy.command("block", "198.18.77.0/24")
    before = proxy.json("list")["rules"]
    state = str(Instance(proxy.instance).state_dir)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "full", state], check=True)
    try:
        with open(f"{state}/filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        for command in (("block", client.ipv4), ("unblock", "198.18.77.0/24"), ("allow", client.ipv4, "--ttl", "1h")):
            failed = proxy.command(*command, check=False)
            assert (failed.returncode, "No space left" in failed.stderr) == (3, True), failed
        assert proxy.json("list")["rules"] == before
        assert answered(client, server.ipv4)
    finally:
        subprocess.run(["umount", "-l", state], check=True)
    proxy.command("block", client.ipv4)
    assert shut_out(client, server.ipv4)

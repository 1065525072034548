"""The server with a policy that could shut everybody out, with feeds that do not answer, and after a restart."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path

import pytest

from rama_ebpf.control.verdicts import MAX_NAMED_RULES

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT = 1080
NOBODY = {
    "everybody-denied": '[[rules]]\nname = "everybody"\naction = "drop"\nsources = ["0.0.0.0/0", "::/0"]\n',
    "default-deny-without-rules": 'default = "drop"\nrules = []\n',
}


def answered(client: Host, server: str, timeout: float = 15) -> bool:
    """Whether the proxy answers a SOCKS5 greeting."""
    with contextlib.suppress(OSError), client.connect(server, PORT, timeout=timeout) as sock:
        sock.sendall(b"\x05\x01\x00")
        return sock.recv(2) == b"\x05\x00"
    return False


def shut_out(client: Host, server: str) -> bool:
    """Whether it does not for a moment."""
    return not answered(client, server, timeout=1)


def test_whoever_locks_everybody_out_is_let_in_by_the_failsafe_and_undone(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client, operator = lab.host("proxy"), lab.host("client"), lab.host("operator")
    failsafe = ["--failsafe", operator.ipv4, "--failsafe", operator.ipv6]
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", "--listen", f"[{server.ipv6}]:{PORT}", *failsafe)
    both = (server.ipv4, server.ipv6)
    path = tmp_path / "nobody.toml"
    assert all(answered(client, address) for address in both)
    for text in NOBODY.values():
        path.write_text(text)
        proxy.command("policy", "load", str(path), "--confirm-timeout", "1h")
        assert all(shut_out(client, address) for address in both), text
        assert all(answered(operator, address) for address in both), text
        proxy.command("policy", "rollback")
        assert all(answered(client, address) for address in both), text

        # Nobody confirms. Neither a command nor the server undoes it: the server is stopped meanwhile.
        proxy.signal(signal.SIGSTOP)
        try:
            proxy.command("policy", "load", str(path), "--confirm-timeout", "2s")
            wait_for(lambda: proxy.json("list")["confirm_within"] is None, timeout=60)
            assert (proxy.json("list")["default"], proxy.json("list")["rules"]) == ("allow", [])
        finally:
            proxy.signal(signal.SIGCONT)
        assert all(answered(client, address) for address in both), text

    proxy.command("policy", "load", str(path), "--confirm-timeout", "1h")
    proxy.command("policy", "confirm")
    assert shut_out(client, server.ipv4)
    assert [entry["what"] for entry in proxy.json("policy", "log")["entries"]][-2:] == ["load", "confirm"]


def _config(directory: Path, server: Host, policy: str) -> str:
    path = directory / "rama.toml"
    path.write_text(
        f'[server]\nworkers = 1\n[listeners.socks]\naddress = "{server.ipv4}:{PORT}"\nstack = "s"\n'
        f'[stacks.s]\nservice = "mixed"\n'
        f'layers = [{{ strikes = {{ strikes = 2, window = "5m", ban = "1h" }} }}]\n[policy]\n{policy}\n'
    )
    return str(path)


def test_a_feed_server_that_hangs_hinders_neither_start_nor_reload_nor_stop(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    with server.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        feed = f'feed = {{ url = "http://127.0.0.1:{silent.getsockname()[1]}/", timeout = "5m" }}'
        rule = f'[[policy.rules]]\nname = "listed"\naction = "drop"\n{feed}'
        proxy = start_proxy(server, "--config", _config(tmp_path, server, rule))
        assert proxy.logged("rule listed: it has no sources yet")
        assert answered(client, server.ipv4)
        _config(tmp_path, server, f'{rule}\n[[policy.rules]]\nname = "x"\naction = "drop"\nsources = ["{client.ipv4}"]')
        proxy.signal(signal.SIGHUP)
        wait_for(lambda: shut_out(client, server.ipv4), timeout=60)
        proxy.signal(signal.SIGTERM)
        assert proxy.wait(60) == 0


def test_strikes_ban_and_bans_and_the_configured_set_are_in_force_after_a_restart(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client, other = lab.host("proxy"), lab.host("client"), lab.host("other")
    rule = f'[[policy.rules]]\nname = "other"\naction = "drop"\nsources = ["{other.ipv4}"]'
    config = ("--config", _config(tmp_path, server, rule))
    proxy = start_proxy(server, *config)
    assert answered(client, server.ipv4)
    for _ in range(2):
        with client.connect(server.ipv4, PORT, timeout=15) as sock:
            sock.sendall(b"\x05\x01\x00\x05\x09\x00\x01" + bytes(6))  # SOCKS5, and no command that there is
            with contextlib.suppress(ConnectionError):
                while sock.recv(64):
                    pass
    wait_for(lambda: proxy.json("bans")["bans"], what="the ban")
    assert shut_out(client, server.ipv4)
    (tmp_path / "none.toml").write_text("rules = []")
    proxy.command("policy", "load", str(tmp_path / "none.toml"), "--confirm-timeout", "1h")
    assert answered(other, server.ipv4)
    proxy.signal(signal.SIGTERM)  # the policy's maps go too
    assert proxy.wait() == 0

    proxy = start_proxy(server, *config)
    assert proxy.logged("restored 1 ban from the previous run")
    assert shut_out(client, server.ipv4)
    assert shut_out(other, server.ipv4)
    (ban,) = proxy.json("bans")["bans"]
    assert ban["address"] == client.ipv4
    assert ban["reason"].startswith("2 strikes, the last: ")
    assert 3000 < ban["expires_in"] < 3600
    whats = [entry["what"] for entry in proxy.json("policy", "log")["entries"]]
    assert whats[:3] == ["load", "ban", "load"]
    proxy.command("unblock", client.ipv4)
    assert answered(client, server.ipv4)


def _be(client: Host, source: str) -> None:
    """Give a client an address, if it has not got it."""
    extra = ("nodad",) if ":" in source else ()
    client.ip("address", "replace", f"{source}/{128 if ':' in source else 32}", "dev", "lo", *extra)


def _offends(client: Host, server: str, source: str) -> None:
    """Break the SOCKS5 protocol, from an address that is there for that."""
    _be(client, source)
    with client.connect(server, PORT, source=source, timeout=15) as sock:
        sock.sendall(b"\x05\x01\x00\x05\x09\x00\x01" + bytes(6))
        with contextlib.suppress(ConnectionError):
            while sock.recv(64):
                pass


def _gets_in(client: Host, server: str, source: str) -> bool:
    _be(client, source)
    with contextlib.suppress(OSError), client.connect(server, PORT, source=source, timeout=1) as sock:
        sock.sendall(b"\x05\x01\x00")
        return sock.recv(2) == b"\x05\x00"
    return False


def _banned(proxy: ProxyProcess) -> dict[str, str]:
    """The reasons of the bans in force."""
    return {row["address"]: row["reason"] for row in proxy.json("bans")["bans"]}


def _attacked(lab: Lab, strikes: int, tmp_path: Path) -> tuple[Host, Host, Path]:
    """A server, a client of many IPv6 addresses, and a configuration."""
    server, client = lab.host("proxy"), lab.host("client")
    server.ip("-6", "route", "add", "2001:db8:100::/40", "via", client.ipv6)
    path = tmp_path / "rama.toml"
    path.write_text(
        f'[server]\nworkers = 1\n[listeners.a]\naddress = "{server.ipv4}:{PORT}"\nstack = "s"\n'
        f'[listeners.b]\naddress = "[{server.ipv6}]:{PORT}"\nstack = "s"\n'
        f'[stacks.s]\nservice = "mixed"\nlayers = [{{ strikes = {{ strikes = {strikes}, ban = "1h" }} }}]\n'
        "[limits]\nmax_bans = 64\n"
    )
    return server, client, path


def test_who_changes_the_address_within_a_64_is_kept_out_after_its_strikes(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client, path = _attacked(lab, 3, tmp_path)
    proxy = start_proxy(server, "--config", str(path))
    for n in range(1, 4):
        _offends(client, server.ipv6, f"2001:db8:178::{n}")
    wait_for(lambda: _banned(proxy), what="the ban")
    for n in range(4, 9):
        assert not _gets_in(client, server.ipv6, f"2001:db8:178::{n}:{n}")
    assert _gets_in(client, server.ipv6, "2001:db8:178:1::1")
    (ban,) = proxy.json("bans")["bans"]
    assert (ban["address"], ban["reason"][:9]) == ("2001:db8:178::/64", "3 strikes")
    assert ban["hits"] >= 5
    said = proxy.command("test", f"[2001:db8:178::ffff]:{PORT}", check=False)
    assert said.stdout.splitlines()[0] == (f"2001:db8:178::ffff to port {PORT}: drop (ban of 2001:db8:178::/64)")
    assert "the ban of 2001:db8:178::/64 covers it" in proxy.command("unblock", "2001:db8:178::1", check=False).stdout
    proxy.command("unblock", "2001:db8:178::/64")
    assert _gets_in(client, server.ipv6, "2001:db8:178::4:4")


def test_bans_of_attackers_leave_room_for_operators_and_new_offenders(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client, path = _attacked(lab, 1, tmp_path)
    proxy = start_proxy(server, "--config", str(path))
    for n in range(70):
        _offends(client, server.ipv6, f"2001:db8:1{n:02x}::1")
    wait_for(lambda: "2001:db8:145::/64" in _banned(proxy), what="the last attacker's ban")
    assert len(_banned(proxy)) == 56
    proxy.command("ban", "198.18.9.9", "--reason", "an operator's")
    _offends(client, server.ipv4, "198.18.7.7")
    wait_for(lambda: "198.18.7.7" in _banned(proxy), what="the ban of an IPv4 address")
    assert not _gets_in(client, server.ipv4, "198.18.7.7")
    assert not _gets_in(client, server.ipv6, "2001:db8:145::9")  # the last attacker, not the first
    rows = _banned(proxy)
    assert rows["198.18.9.9"] == "an operator's"
    assert len(rows) == 57


def test_a_set_on_trial_is_undone_by_a_reload_and_when_the_server_starts_anew(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    config = ("--config", _config(tmp_path, server, 'default = "allow"'))
    proxy = start_proxy(server, *config)
    path = tmp_path / "nobody.toml"
    path.write_text(NOBODY["default-deny-without-rules"])
    proxy.command("policy", "load", str(path), "--confirm-timeout", "1h")
    assert shut_out(client, server.ipv4)
    proxy.signal(signal.SIGHUP)
    wait_for(
        lambda: proxy.logged("the set on trial is undone: the configuration says what is to be in force"), timeout=60
    )
    wait_for(lambda: answered(client, server.ipv4, timeout=1), timeout=60)
    proxy.command("policy", "load", str(path), "--confirm-timeout", "1h")
    assert shut_out(client, server.ipv4)
    proxy.signal(signal.SIGKILL)
    proxy.wait()
    proxy = start_proxy(server, *config)
    assert proxy.logged("the set on trial is undone")
    assert answered(client, server.ipv4)


def verdicts_of_rules(server: Host) -> dict[str, float]:
    """The values of ``rama_verdicts_total`` for rules, by their names."""
    text = server.run("curl", "-sS", "--max-time", "30", "http://127.0.0.1:9464/metrics").stdout
    rows = re.findall(r'^rama_verdicts_total\{action="\w+",rule="([^"]+)",stage="rule"\} (\S+)$', text, flags=re.M)
    assert "rama_workers" in text
    return {name: float(value) for name, value in rows}


def test_metrics_name_rules_of_the_set_and_never_an_address_and_do_not_go_back(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", "--metrics", "127.0.0.1:9464")
    path = tmp_path / "set.toml"
    path.write_text(f'[[rules]]\nname = "office"\naction = "allow"\nsources = ["{client.ipv4}"]\n')
    proxy.command("policy", "load", str(path))
    assert answered(client, server.ipv4)
    wait_for(lambda: verdicts_of_rules(server).get("office") == 1, what="the count of the set's rule")
    seen = 0.0
    for _ in range(2):
        proxy.command("block", f"{client.ipv4}/32")
        assert shut_out(client, server.ipv4)
        counted = verdicts_of_rules(server)
        assert (set(counted), counted["other"] > seen) == ({"office", "other"}, True)
        seen = counted["other"]
        proxy.command("unblock", client.ipv4)
        assert verdicts_of_rules(server)["other"] >= seen
    rows = "".join(f'[[rules]]\nname = "r{n}"\naction = "drop"\nsources = ["192.0.2.{n % 256}"]\n' for n in range(1500))
    path.write_text(rows)
    proxy.command("policy", "load", str(path))
    named = verdicts_of_rules(server)
    assert (len(named), "r999" in named, "r1000" in named) == (MAX_NAMED_RULES + 1, True, False)

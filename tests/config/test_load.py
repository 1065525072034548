from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from rama_ebpf.config import Config, ConfigError, load_config
from rama_ebpf.config.load import config_of
from rama_ebpf.config.services import HttpSettings, MixedSettings
from rama_ebpf.config.show import effective, to_toml
from rama_ebpf.layers.auth import hash_password
from rama_ebpf.services.http import HttpLimits

Write = Callable[[str], Path]

GOOD = """
[server]
workers = 2
metrics = "127.0.0.1:9464"

[listeners.socks]
address = "127.0.0.1:1080"
stack = "office"

[listeners.local]
address = "unix:/run/proxy.sock"
stack = "plain"

[stacks.plain]
service = "echo"

[stacks.office]
service = { socks5 = { users = "users" } }
layers = [
    { concurrency = { limit = 50, per = "source" } },
    { rate = { rate = "600/m", burst = 20, wait = "500ms" } },
    "strikes",
    { timeout = { handshake = "10s", idle = "off", total = "1h30m" } },
]

[stacks.office.connect]
via = ["socks5://tom:secret@127.0.0.1:1081"]
retry = {}
breaker = { failures = 3 }
targets = { deny_ports = [25], deny_hosts = ["*.internal"] }

[egress]
allow = ["198.18.0.0/15"]

[[policy.rules]]
name = "abuse"
sources = ["198.18.7.0/24", "2001:db8::/32"]
action = "limit"
rate = "5/s"
burst = 10
ttl = "1d"
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    (tmp_path / "users").write_text("# nobody yet\n")

    def to_file(text: str) -> Path:
        path = tmp_path / "rama.toml"
        path.write_text(textwrap.dedent(text).lstrip())
        return path

    return to_file


def minimal(more: str = "", layers: str = "[]", service: str = '"echo"') -> str:
    head = '[listeners.a]\naddress = "127.0.0.1:1080"\nstack = "s"\n'
    return f"{head}[stacks.s]\nservice = {service}\nlayers = {layers}\n{more}\n"


def mistakes(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    return [line.removeprefix(f"{path}:").lstrip() for line in str(refused.value).splitlines()]


def test_a_good_file_is_what_it_says(write: Write) -> None:
    config = load_config(write(GOOD))
    assert config.server.workers == 2
    assert str(config.listeners["local"].address) == "unix:/run/proxy.sock"
    assert config.policy.rules[0].rule(now=0).expires == 86400 * 10**9
    assert config.stacks["office"].connect.timeout == 10.0


def test_the_effective_configuration_is_the_same_configuration(write: Write, tmp_path: Path) -> None:
    config = load_config(write(GOOD))
    values = effective(config)
    assert config_of(values) == config
    text = to_toml(values)
    assert tomllib.loads(text) == values
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert effective(load_config(again)) == values


def test_every_mistake_is_told_with_its_line_and_what_is_allowed(write: Write) -> None:
    path = write(
        """
        [servr]
        [server]
        workers = 1000
        user = "root"
        metrics = "0.0.0.0:9464"
        drain = "10 parsecs"
        [listeners.socks]
        adress = "127.0.0.1:1080"
        stack = "office"
        [listeners.web]
        address = "::1:80"
        stack = "office"
        [stacks.office]
        service = "sock5"
        layers = ["tmeout", {
        concurrency = { limit = "many", per = "user" } }]
        [[policy.rules]]
        name = "abuse"
        sources = ["198.18.7.1/24"]
        action = "deny"
        [[policy.rules]]
        name = "slow"
        sources = ["198.18.0.0/15"]
        action = "limit"
        [[policy.rules]]
        name = "empty"
        sources = []
        action = "drop"
        """.replace("{\n        concurrency", "{ concurrency")
    )
    expected = [
        r"1: servr: there is no such setting: did you mean \"server\"\?; there are egress, .*stacks",
        r"3: server\.workers: 1000: write a whole number from 1 to 64",
        r"4: server\.user: \"root\": .*name an unprivileged user, e\.g\. nobody",
        r"5: server\.metrics: \"0\.0\.0\.0:9464\": .*loopback only.*127\.0\.0\.1:9464",
        r"6: server\.drain: \"10 parsecs\": write a time such as .*\"1h30m\"",
        r"7: listeners\.socks\.address: this setting is needed \(address and port\)",
        r"8: listeners\.socks\.adress: .*did you mean \"address\"\?; there are address, .*stack",
        r"11: listeners\.web\.address: \"::1:80\": write for example .*\[::1\]:1080",
        r"14: stacks\.office\.service: there is no service \"sock5\": did you mean \"socks5\"\?; there are .*mixed",
        r"15: stacks\.office\.layers\[0\]: there is no layer \"tmeout\": did you mean \"timeout\"\?; there are ",
        r"15: stacks\.office\.layers\[1\]\.concurrency\.limit: \"many\": write a whole number",
        r"15: stacks\.office\.layers\[1\]\.concurrency\.per: \"user\": write one of \"listener\", \"source\"",
        r"18: policy\.rules\[0\]\.sources\[0\]: .*has host bits set: write 198\.18\.7\.0/24",
        r"19: policy\.rules\[0\]\.action: \"deny\": write one of \"allow\", \"drop\", \"reject\", \"limit\"",
        r"20: policy\.rules\[1\]: .*limit and a rate belong together",
        r"24: policy\.rules\[2\]: sources is empty",
    ]
    found = mistakes(path)
    assert len(found) == len(expected), "\n".join(found)
    for line, pattern in zip(found, expected, strict=True):
        assert re.match(pattern, line), f"{line}\nis not\n{pattern}"


LISTENER_B = '[listeners.b]\naddress = "127.0.0.1:{port}"\nstack = "{stack}"'


RULE = '[[policy.rules]]\nname = "r{n}"\naction = "drop"\nsources = ["198.18.0.{n}"]\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1: listeners: this setting is needed"),
        ("a = = 1", "1: not TOML: Invalid value"),
        ('x = 1\ny = "', "2: not TOML: Unterminated string"),
        ("x = 1\nx = 2\n", "2: not TOML: Cannot overwrite a value"),
        ("[listeners]\n[stacks]\n", "1: listeners: there is no listener"),
        (minimal(LISTENER_B.format(port=1080, stack="s")), "8: listeners.b.address: 127.0.0.1:1080 is also that of"),
        (minimal(LISTENER_B.format(port=1081, stack="t")), '9: listeners.b.stack: there is no stack "t"; there are s'),
        (minimal(layers='["timeout", 7]'), '6: stacks.s.layers[1]: name one layer: "name" or'),
        (minimal(layers="[{ timeout = { total = true } }]"), "6: stacks.s.layers[0].timeout.total: true: write a time"),
        (minimal(layers='[{ tls = { chain = "users" } }]'), "6: stacks.s.layers[0].tls: name chain and key, or a"),
        (minimal(layers='[{ tls = { chain = "users", key = "users" } }]'), "4: stacks.s: "),
        (minimal(service='{ socks5 = { users = "nowhere" } }'), "5: stacks.s.service.socks5.users: "),
        (minimal(service='{ custom = { target = "nowhere:app" } }'), "4: stacks.s: cannot load nowhere:app: No module"),
        (minimal(service='{ custom = { target = "nowhere" } }'), '5: stacks.s.service.custom.target: "nowhere": write'),
        (minimal(service="{ reverse = { routes = [] } }"), "5: stacks.s.service.reverse: routes is empty"),
        (
            minimal(service='{ reverse = { routes = [{ backends = ["a"] }] } }'),
            '5: stacks.s.service.reverse.routes[0].backends[0]: "a": write host and port',
        ),
        (
            minimal(service='{ reverse = { routes = [{ backends = ["a:1"], path = "x" }] } }'),
            '5: stacks.s.service.reverse.routes[0]: path "x": it begins with /',
        ),
        (
            minimal('[stacks.s.connect]\nvia = ["gopher://x"]'),
            '8: stacks.s.connect.via[0]: "gopher://x": proxy URL: the scheme',
        ),
        (minimal('[stacks.s.connect]\ninterface = "a-name-that-is-too-long"'), "7: stacks.s.connect: 'a-name-that-is"),
        (minimal('[egress]\nallow = "10.0.0.0/8"'), "8: egress.allow: write an array"),
        (minimal("[policy]\nsyn_cookies = true"), "7: policy: syn_cookies: XDP sends them, so name at least one"),
        (minimal("[policy.rejects]\nburst = 5"), "7: policy.rejects.rate: this setting is needed"),
        (minimal("server = 5"), "7: stacks.s.server: there is no such setting"),
        (
            minimal(layers="[{ proxy-protocol = { trusted = [] } }]"),
            "6: stacks.s.layers[0].proxy-protocol: trusted names nobody",
        ),
        ("server = 5\n" + minimal(), "1: server: write a table"),
        (
            minimal("".join(f'[listeners.l{n}]\naddress = "127.0.0.1:{n}"\nstack = "s"\n' for n in range(2000, 3024))),
            "1: listeners: 1025 TCP listeners: a gate has at most 1024",
        ),
        (minimal(f"[policy]\nxdp = {[f'eth{n}' for n in range(65)]}"), "8: policy.xdp: 65 interfaces: use at most 64"),
        (
            minimal("[limits]\nmax_rules = 16\n" + "".join(RULE.format(n=n) for n in range(16))),
            "9: policy.rules: 16 rules: there is room for 15 (limits.max_rules above 16 makes more)",
        ),
    ],
)
def test_one_mistake(write: Write, text: str, expected: str) -> None:
    found = mistakes(write(text))
    assert any(line.startswith(expected) for line in found), "\n".join(found)


def test_a_password_file_with_a_bad_line_is_told(write: Write, tmp_path: Path) -> None:
    (tmp_path / "users").write_text(f"tom:{hash_password('x')}\nanna:plain\n")
    (line,) = mistakes(write(minimal(service='{ socks5 = { users = "users" } }')))
    assert re.match(r"4: stacks\.s: .*users:2: the hash must be", line)


def test_a_stack_whose_parts_do_not_fit_is_told_with_the_layers_name(write: Write, tmp_path: Path) -> None:
    (tmp_path / "misfit_layers.py").write_text(
        "class Wrong:\n    accepts = str\n    provides = str\n    def __call__(self, inner):\n        return inner\n"
    )
    (line,) = mistakes(write(minimal(layers='[{ custom = { target = "misfit_layers:Wrong" } }, "timeout"]')))
    assert line == (
        "4: stacks.s: Wrong hands on str, but TimeoutLayer takes Stream: "
        "put the layer or service that turns the one into the other between them"
    )


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "nowhere.toml") == ["cannot be read: No such file or directory"]


def test_defaults_alone_make_a_configuration(write: Write) -> None:
    config = load_config(write(minimal()))
    assert isinstance(config, Config)
    assert config.logging.access


def test_limits_waits_and_upgrades_of_http_reach_its_services(write: Write) -> None:
    text = (
        "limits = { head = 5000, target = 300, fields = 7 }, timeouts = { watch = 3, linger = 1, expect_continue = 2 }"
    )
    for service in ("http", "mixed"):
        path = write(minimal(service=f'{{ {service} = {{ {text}, upgrades = ["websocket", "tls/1.2"] }} }}'))
        settings = load_config(path).stacks["s"].service
        assert isinstance(settings, HttpSettings | MixedSettings)
        limits, timeouts = settings.limits.limits(settings.engine), settings.timeouts.timeouts()
        assert (limits.head, limits.target, limits.fields, limits.trailers) == (5000, 300, 7, HttpLimits().trailers)
        assert (timeouts.watch, timeouts.linger, timeouts.expect_continue) == (3.0, 1.0, 2.0)
        assert settings.upgrades == ("websocket", "tls/1.2")


@pytest.mark.parametrize("service", ["http", "mixed", "reverse"])
@pytest.mark.parametrize(
    ("name", "why"), [("h2c", "out of our sight"), ("WebSocket", "lower case"), ("a b", "lower case")]
)
def test_an_upgrade_that_cannot_be_is_refused(write: Write, service: str, name: str, why: str) -> None:
    routes = 'routes = [{ backends = ["127.0.0.1:1"] }], ' if service == "reverse" else ""
    (line,) = mistakes(write(minimal(service=f'{{ {service} = {{ {routes}upgrades = ["{name}"] }} }}')))
    assert why in line

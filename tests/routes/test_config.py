"""Routes and ways of a file: mistakes have their lines, secrets are not shown, nothing is silently direct."""

from __future__ import annotations

from pathlib import Path

import pytest

from rama_ebpf.config import ConfigError, load_config
from rama_ebpf.config.load import config_of
from rama_ebpf.config.show import effective, to_toml

HEAD = '[listeners.front]\naddress = "127.0.0.1:1080"\nstack = "proxy"\n[stacks.proxy]\nservice = {service}\n'
IT = '[ways.it]\nproxy = { url = "http://h" }\n'
ROUTE = '[[routes]]\nname = "r"\nway = "it"\n'


def mistakes(tmp_path: Path, text: str, service: str = '"socks5"') -> str:
    path = tmp_path / "rama.toml"
    path.write_text(HEAD.format(service=service) + text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[[routes]]\nname = "r"\nway = "gone"\n', ":6: routes[0]: route r names the way 'gone', which is not there"),
        (ROUTE + "[ways.it]\ngroup = { members = [] }\n", "the group is empty"),
        (ROUTE + '[ways.it]\ngroup = { members = ["it"] }\n', ":9: ways.it: groups go round in a circle: it → it"),
        (ROUTE + '[ways.it]\ngroup = { members = ["x"] }\n', "group it names the way 'x', which is not there"),
        (ROUTE + '[ways.it]\ngroup = { members = ["direct", "direct"] }\n', "names direct twice: use weights"),
        (ROUTE + '[ways.direct]\nproxy = { url = "http://h" }\n', "the name is reserved"),
        (ROUTE + ROUTE + '[ways.it]\nproxy = { url = "http://h" }\n', ":9: routes[1]: there are two routes 'r'"),
        (ROUTE + '[ways.it]\nproxy = { url = "http://u:s3cret@h/path" }\n', 'ways.it.proxy.url: "http://***@h/path"'),
        (ROUTE + '[ways.it]\nproxy = { url = "http://h", ca = "rama.toml" }\n', "ca is for https:// and socks5s://"),
        (ROUTE + '[ways.it]\nchain = { hops = ["direct"] }\n', "goes through direct, which is no parent"),
        ('[ways.it]\nproxy = { url = "http://h" }\n', "there are ways, and no [[routes]] that lead there"),
        (
            ROUTE + 'listeners = ["x"]\n[ways.it]\nproxy = { url = "http://h" }\n',
            'there is no listener "x"; there are front',
        ),
        (
            ROUTE + '[ways.it]\nproxy = { url = "http://h" }\n[stacks.proxy.connect]\nvia = ["http://h"]\n',
            "beside [[routes]]",
        ),
        ("[stacks.proxy.connect]\nroutes = true\n", "there are no [[routes]]"),
    ],
)
def test_mistake_is_refused_with_its_line_and_the_remedy(tmp_path, text, wanted):
    found = mistakes(tmp_path, text)
    assert wanted in found
    assert "s3cret" not in found


@pytest.mark.parametrize("url", ["http://h:1", "https://h:1", "socks4://h:1", "socks5s://h:1"])
def test_datagrams_that_no_way_can_carry_are_refused_by_check(tmp_path, url):
    """T9: they went out directly beside via."""
    service = "{ socks5 = { udp = true } }"
    assert "no way can carry datagrams" in mistakes(tmp_path, f'[stacks.proxy.connect]\nvia = ["{url}"]\n', service)
    text = ROUTE + f'[ways.it]\nproxy = {{ url = "{url}" }}\n'
    assert "no way can carry datagrams" in mistakes(tmp_path, text, service)


def test_passwords_of_parents_are_not_shown_and_reach_the_workers(tmp_path):
    """T10: config show printed them."""
    path = tmp_path / "rama.toml"
    via = '[stacks.proxy.connect]\nroutes = false\nvia = ["socks5://tom:s3cret@127.0.0.1:1081"]\n'
    path.write_text(
        HEAD.format(service='"socks5"') + via + ROUTE + '[ways.it]\nproxy = { url = "https://ann:s3cret@h" }\n'
    )
    config = load_config(path)
    shown = to_toml(effective(config, hidden=True))
    assert "s3cret" not in shown
    assert shown.count("***@") == 2
    assert config_of(effective(config)) == config
    assert "s3cret" in to_toml(effective(config))


def test_reverse_proxy_does_not_follow_routes_of_clients(tmp_path):
    path = tmp_path / "rama.toml"
    reverse = '{ reverse = { routes = [{ backends = ["127.0.0.1:80"] }] } }'
    text = HEAD.format(service=reverse) + '[stacks.proxy.connect]\nsource_v4 = "127.0.0.1"\n'
    path.write_text(text + ROUTE + '[ways.it]\nproxy = { url = "http://h" }\n')
    assert load_config(path).routes

"""A wall clock that jumps by a year, forth and back, under a server that runs and over its restarts. It is injected
where Python asks for the time: nobody sets the host's for a test."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import StartProxy
from ..hammer import Denied
from ..lab import Host, wait_for
from .conftest import ALLOWED, CONFIG, DENIED, TARGET, met

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(300)]

YEAR = 365 * 86400
INJECTED = """
import time

_time, _time_ns = time.time, time.time_ns

def _offset():
    with open({file!r}) as file:
        return int(file.read() or 0)

time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + _offset() * 1_000_000_000
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can reach: pytest's own are root's."""
    with tempfile.TemporaryDirectory(prefix="rama-ebpf-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_a_clock_that_jumps_by_a_year_lets_nobody_in_and_keeps_nobody_out_for_longer(
    host: Host, start_proxy: StartProxy, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = place / "offset"
    offset.write_text("0")
    (place / "sitecustomize.py").write_text(INJECTED.format(file=str(offset)))
    monkeypatch.setenv("PYTHONPATH", str(place))
    file = tmp_path / "rama.toml"
    file.write_text(CONFIG.format(workers=1, server="", policy="") + f'[sandbox]\nread = ["{offset}"]\n')
    proxy = start_proxy(host, "--config", str(file), "--require-sandbox")

    banned, blocked = ALLOWED[2:4]
    with Denied(host, DENIED, [TARGET]) as denied:
        proxy.command("ban", banned, "--ttl", "1h")
        proxy.command("block", blocked, "--ttl", "1h")
        for jump in (YEAR, -YEAR):
            offset.write_text(str(jump))
            for again in (False, True):
                if again:
                    proxy.signal(signal.SIGKILL)
                    proxy.end()
                    proxy.start()
                assert [met(host, source) for source in (ALLOWED[0], banned, blocked)] == ["in", "silence", "silence"]
                said = proxy.json("list")
                lasts = [row["expires_in"] for row in (*said["bans"], *said["rules"]) if row["expires_in"] is not None]
                assert len(lasts) == 2
                assert all(0 < seconds <= 3600 for seconds in lasts), (jump, lasts)
            proxy.signal(signal.SIGHUP)
            wait_for(lambda: proxy.logged(": reloaded$"), timeout=60, what="the reload")
        offset.write_text("0")
        assert [met(host, source) for source in (ALLOWED[0], banned, blocked)] == ["in", "silence", "silence"]
        proxy.command("unblock", banned)
        assert met(host, banned) == "in"
    assert denied.got_in == []
    assert not proxy.logged("Traceback"), proxy.log

"""Logs for machines: each line a JSON object, whatever a peer sends."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rama_ebpf.core import Authority
from rama_ebpf.core.json_lines import JsonFormatter
from rama_ebpf.layers.access_log import AccessRecord

from ..conftest import StartProxy
from ..lab import Lab, wait_for

CONFIG = """
[listeners.web]
address = "127.0.0.1:1080"
stack = "web"
[stacks.web]
service = {http = {}}
[server]
workers = 1
[logging]
format = "json"
"""


def line(record: logging.LogRecord) -> dict[str, object]:
    text = JsonFormatter({"worker": 3}).format(record)
    assert text.isascii()
    assert "\n" not in text
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def test_no_text_of_a_peers_breaks_a_line_or_takes_the_place_of_a_field() -> None:
    record = AccessRecord(None, None, 'tom\n{"level":"error"}', Authority.of("a", 1), "done", 1, 2, 0.12345)
    found = line(logging.makeLogRecord({"name": "a", "levelname": "INFO", "created": 0.5, "access": record}))
    assert found == {
        "time": "1970-01-01T00:00:00.500+00:00",
        "level": "info",
        "logger": "a",
        "worker": 3,
        "event": "access",
        "client": "unix",
        "user": 'tom\n{"level":"error"}',
        "target": "a:1",
        "reason": "done",
        "received": 1,
        "sent": 2,
        "age": 0.123,
    }


def test_traceback_is_a_field() -> None:
    try:
        raise ValueError("oops")
    except ValueError as error:
        record = logging.LogRecord("a", logging.ERROR, "", 1, "%s failed", ("x",), (ValueError, error, None))
    found = line(record)
    assert (found["message"], found["level"]) == ("x failed", "error")
    assert "ValueError: oops" in str(found["traceback"])


@pytest.mark.root
@pytest.mark.ebpf
def test_server_and_workers_log_objects(lab: Lab, start_proxy: StartProxy, tmp_path: Path) -> None:
    (tmp_path / "rama.toml").write_text(CONFIG)
    host = lab.host("proxy")
    proxy = start_proxy(host, "--config", str(tmp_path / "rama.toml"))
    with host.connect("127.0.0.1", 1080) as client:
        client.sendall(b"GET http://192.168.0.1/ HTTP/1.1\r\nHost: 192.168.0.1\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 403"
    rows = wait_for(
        lambda: [row for row in map(json.loads, proxy.log) if row.get("event") == "access"], what="the request's line"
    )
    assert (rows[0]["method"], rows[0]["status"], rows[0]["worker"]) == ("GET", 403, 0)
    assert isinstance(rows[0]["total"], float)

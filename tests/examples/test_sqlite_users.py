from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from rama_ebpf.layers.auth import hash_password

from ..lab import Host
from .conftest import RunExample


def test_users_of_a_database_are_held_to_their_rate_and_targets(
    run_example: RunExample, directory: Path, host: Host, web: str, tmp_path: Path, curl
) -> None:
    with sqlite3.connect(directory / "users.db") as users:
        users.execute("CREATE TABLE users (name TEXT PRIMARY KEY, hash TEXT, rate REAL, allow TEXT)")
        for name, rate, allow in (("tom", 1e9, "127.0.0.1/32"), ("slow", 65536, "127.0.0.1/32"), ("lost", 1e9, "")):
            row = (name, hash_password(f"{name}'s", (13, 1)), rate, allow)
            users.execute("INSERT INTO users VALUES (?, ?, ?, ?)", row)
    (tmp_path / "www" / "large").write_bytes(bytes(192 * 1024))
    run_example("sqlite_users:proxy", "--allow-egress", "127.0.0.1")

    def fetch(user: str, page: str = "") -> str:
        result = curl("--proxy", f"socks5h://{user}@127.0.0.1:1080", f"http://127.0.0.1:8080/{page}")
        return str(result.stdout)

    assert fetch("tom:tom%27s") == web
    assert fetch("tom:guess") == fetch("nobody:tom%27s") == ""
    assert fetch("lost:lost%27s") == ""  # nothing is allowed to her
    begun = time.monotonic()
    assert len(fetch("slow:slow%27s", "large")) == 192 * 1024
    assert time.monotonic() - begun >= 1.5  # 64 KiB at once, the rest at 64 KiB/s: no load makes that faster

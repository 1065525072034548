"""``policy log`` names who changed something."""

from __future__ import annotations

import os
import pwd

from rama_ebpf.cli.ruleset import _user_name


def test_users_have_names_and_strangers_numbers() -> None:
    uid = os.getuid()
    assert _user_name(uid) == pwd.getpwuid(uid).pw_name
    assert _user_name(4_000_000_001) == 4_000_000_001
    assert _user_name(1 << 40) == 1 << 40
    assert _user_name(None) is None

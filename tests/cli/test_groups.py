from __future__ import annotations

import argparse
import importlib

import pytest

from rama_ebpf.cli import _GROUPS, main


@pytest.mark.parametrize("group", _GROUPS)
def test_each_group_registers_just_the_commands_that_it_is_listed_with(group: str) -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    importlib.import_module(f"rama_ebpf.cli.{group}").register(commands, argparse.ArgumentParser(add_help=False))
    assert tuple(commands.choices) == _GROUPS[group]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for commands in _GROUPS.values():
        for command in commands:
            assert f"    {command} " in text


def test_unknown_command_is_one_line_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "'serve'" in error

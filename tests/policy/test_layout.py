"""The numbers that the kernel programs and the Python code agree on."""

from __future__ import annotations

from rama_ebpf.kernel import abi
from rama_ebpf.policy import compiler, intervals
from rama_ebpf.policy.prefixes import Prefixes
from rama_ebpf.policy.rule import PRECEDENCE, RUNTIME, Action, Rule, Stage


def test_actions_and_stages_are_those_of_the_header() -> None:
    constant = abi.constants()
    for action in Action:
        assert constant[f"ACTION_{action.name}"] == action
    for stage in Stage:
        assert constant[f"STAGE_{stage.name}"] == stage


def test_chains_are_laid_out_as_in_the_header() -> None:
    constant = abi.constants()
    assert constant["MAX_CHAIN"] == compiler.MAX_CHAIN
    assert constant["MAX_CHAIN_ITEMS"] == intervals.MAX_VALUE + 1
    assert constant["MAX_SLOTS"] == intervals.MAX_SLOTS
    assert constant["PAGE_BYTES"] == intervals.PAGE
    for layout in intervals.Layout:
        assert constant[f"LAYOUT_{layout.name}"] == layout


def test_a_rule_s_order_is_made_of_the_bits_of_the_header() -> None:
    constant = abi.constants()
    rule = Rule("r", Prefixes.of(["192.0.2.0/24"]), Action.DROP, port=80, origin=RUNTIME)
    highest = PRECEDENCE[Action.DROP] * constant["ORDER_PRECEDENCE"]
    assert rule.order == constant["ORDER_PORT"] | highest | constant["ORDER_RUNTIME"]
    assert rule.order < 1 << constant["RANK_LENGTH_SHIFT"]

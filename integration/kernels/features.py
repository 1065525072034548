"""What is tried on each kernel, and the table that says how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

__all__ = ["FEATURES", "Feature", "Outcome", "outcomes", "table"]


@dataclass(frozen=True, slots=True)
class Feature:
    """A row of the table: what is shown, and the tests that show it, as pytest wants them."""

    name: str
    tests: tuple[str, ...]
    starts: bool = False
    """Starts whole proxies, each of which compiles: a quick run in an emulated machine leaves it out."""


_GATE = "tests/kernel/test_gate.py::"
_PACKETS = "tests/policy/test_packets.py::"
_EGRESS = "tests/kernel/test_egress.py::"
_ANSWERS = "tests/policy/test_answers.py::"

FEATURES = (
    Feature("every program passes the verifier", ("tests/kernel/test_programs.py",)),
    Feature(
        "gate: a blocked client gets no SYN-ACK (`cgroup_skb`)",
        (f"{_GATE}test_blocked_source_gets_no_answer_until_it_is_unblocked[ipv4]",),
    ),
    Feature("the same for IPv6", (f"{_GATE}test_blocked_source_gets_no_answer_until_it_is_unblocked[ipv6]",), True),
    Feature(
        "steer: rejected SYNs and other ports (`sk_lookup`)",
        (f"{_PACKETS}test_sk_lookup_rejects_and_leaves_other_ports_alone",),
    ),
    Feature("a rejected client gets RST", (f"{_GATE}test_rejected_source_gets_rst[ipv4]",), True),
    Feature(
        "links and pins: after kill -9 no program is left, and the policy is",
        (f"{_GATE}test_kill_9_leaves_no_program_and_the_next_start_keeps_the_policy",),
        True,
    ),
    Feature(
        "XDP: the denied SYN is dropped",
        (
            f"{_PACKETS}test_xdp_drops_the_denied_syn",
            f"{_PACKETS}test_xdp_leaves_to_the_stack_what_it_cannot_judge",
            f"{_PACKETS}test_xdp_leaves_alone_other_ports_and_all_but_syns_and_leaves_rejects_to_sk_lookup",
        ),
    ),
    Feature(
        "XDP: RST for a rejected SYN, byte by byte and up to a rate",
        (
            f"{_ANSWERS}test_rejected_syn_gets_exactly_the_rst_of_rfc_9293",
            f"{_ANSWERS}test_beyond_their_rate_rejects_are_silent_and_counted",
        ),
    ),
    Feature(
        "XDP: the stack's SYN cookies, byte by byte and charged once",
        (
            f"{_ANSWERS}test_admitted_syn_gets_exactly_a_syn_ack_with_an_mss_and_nothing_else",
            f"{_ANSWERS}test_where_the_stack_would_send_no_cookie_the_frame_passes_as_it_came_and_uncounted",
            f"{_ANSWERS}test_cookie_is_charged_to_each_limit_once",
        ),
    ),
    Feature(
        "packets: VLAN, extension headers, fragments, cut frames",
        (
            f"{_PACKETS}test_a_syn_is_found_behind",
            f"{_PACKETS}test_not_the_gate_s_business",
            f"{_PACKETS}test_malformed",
            f"{_PACKETS}test_a_frame_that_is_cut_anywhere_is_malformed",
            f"{_PACKETS}test_a_syn_is_one_without_ack",
        ),
    ),
    Feature(
        "egress: no datagram to what is denied, but answers (`cgroup_sock_addr`)",
        (
            f"{_EGRESS}test_a_worker_cannot_send_a_datagram_where_the_policy_lets_it_dial_nothing",
            f"{_EGRESS}test_a_worker_answers_who_has_sent_to_it_from_that_socket_and_nobody_else",
        ),
        True,
    ),
    Feature("policy: kernel, stores and definition agree", ("tests/policy/test_differential.py",)),
    Feature("the kernel's relay passes its self-test", ("tests/relay/test_selftest.py::test_this_kernel_passes",)),
    Feature(
        "random flows through each relay, every byte",
        ("tests/relay/test_flows.py::test_random_flows_arrive_exactly",),
    ),
    Feature(
        "the command: half-close, whole answer",
        ("integration/test_main_job.py::test_client_that_half_closes_still_gets_the_whole_answer",),
        True,
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many tests of a feature passed of those that ran, and the names of the others."""

    passed: int
    failed: tuple[str, ...]

    def __str__(self) -> str:
        if not self.failed:
            return f"yes ({self.passed})" if self.passed else "not run"
        return f"**no** ({len(self.failed)} of {self.passed + len(self.failed)} failed)"


def outcomes(junit: str) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Read a JUnit report: how each feature went, by its name, and the properties that tests have recorded."""
    results: dict[str, list[tuple[str, bool]]] = {feature.name: [] for feature in FEATURES}
    properties: dict[str, str] = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        name = case.get("name", "")
        test = f"{file}::{name}"
        passed = all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
        for feature in FEATURES:
            if any(test.startswith(wanted) for wanted in feature.tests):
                results[feature.name].append((test, passed))
        for entry in case.iter("property"):
            properties[entry.get("name", "")] = entry.get("value", "")
    return {
        name: Outcome(sum(passed for _, passed in ran), tuple(test for test, passed in ran if not passed))
        for name, ran in results.items()
    }, properties


def table(head: str, columns: Sequence[str], rows: Mapping[str, Sequence[object]]) -> str:
    """Return a Markdown table with a row's name in front."""
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(str(cell) for cell in cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"

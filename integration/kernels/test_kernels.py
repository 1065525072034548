"""The machine that the kernel suite runs in, and how its results are read. ``pytest integration -m vm`` boots it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ..require import SCRATCH, require
from .features import FEATURES, Feature, outcomes
from .guest import GuestFailed, run
from .packages import Kernel, fetch

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    require("kernels")
    return fetch("linux-image-amd64")


@pytest.mark.root
@pytest.mark.vm
@pytest.mark.timeout(900)
def test_command_runs_on_that_kernel_alone_and_its_code_and_files_come_out(kernel: Kernel) -> None:
    command = "uname -r; ls /sys/class/net; touch /usr/of-the-guest && echo text >/run/guest/note; exit 7"
    result = run(kernel, command, ROOT, timeout=600)
    assert result.code == 7
    assert result.output.split() == [kernel.release, "lo"]
    assert result.files["note"] == "text\n"
    assert not Path("/usr/of-the-guest").exists()
    assert not list(SCRATCH.glob("rama-ebpf-guest-*"))


@pytest.mark.root
@pytest.mark.vm
@pytest.mark.timeout(900)
def test_machine_that_does_not_end_is_ended_and_what_it_said_is_told(kernel: Kernel) -> None:
    with pytest.raises(GuestFailed, match=r"(?s)not done after 60 s.*the last words"):
        run(kernel, "echo the last words; sleep 6000", ROOT, timeout=60)
    assert str(kernel.image) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not list(SCRATCH.glob("rama-ebpf-guest-*"))


def test_a_test_that_was_skipped_or_not_run_is_not_taken_for_passed() -> None:
    verifier, gate = FEATURES[0], next(feature for feature in FEATURES if "XDP" in feature.name)
    name = gate.tests[0].rpartition("::")[2]
    junit = f"""
        <testsuites><testsuite>
            <testcase classname="tests.kernel.test_programs" name="test_a">
                <properties><property name="gate_xdp" value="120"/></properties>
            </testcase>
            <testcase classname="tests.policy.test_packets" name="{name}[ipv4]"/>
            <testcase classname="tests.policy.test_packets" name="{name}[ipv6]"><skipped/></testcase>
            <testcase classname="tests.kernel.test_gate" name="of_no_feature"><failure/></testcase>
        </testsuite></testsuites>"""
    found, properties = outcomes(junit)
    assert str(found[verifier.name]) == "yes (1)"
    assert found[gate.name].failed == (f"{gate.tests[0]}[ipv6]",)
    assert str(found[gate.name]) == "**no** (1 of 2 failed)"
    assert {str(found[feature.name]) for feature in FEATURES if feature not in (verifier, gate)} == {"not run"}
    assert properties == {"gate_xdp": "120"}


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_tests_of_a_feature_are_there(feature: Feature) -> None:
    for test in feature.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(encoding="utf-8")

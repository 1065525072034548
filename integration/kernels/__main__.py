"""Run the kernel suite on each kernel, and write docs/kernels.md.

Usage: python -m integration.kernels [host | PACKAGE]...   (default: host, and Debian's 6.1 and 6.12; needs root)

``host`` is the kernel that runs; a PACKAGE is a kernel of Debian's, which is downloaded, not installed, and booted in
an emulated machine. What each did is kept below .cache, and the document is made of all that is there, so that one
kernel can be run again. RAMA_EBPF_QUICK=1 leaves out, in emulated machines, what starts whole proxies. Exits 1 if a
test failed, 3 if something is missing.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ..require import CACHE, Missing, require
from . import guest
from .features import FEATURES, Outcome, outcomes, table
from .packages import fetch

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = ROOT / "docs/kernels.md"
PACKAGES = ("linux-image-amd64", "linux-image-6.12-amd64")

# One emulated CPU: what a real one does in a second takes up to a minute, most of all LLVM.
_EMULATED = {"RAMA_EBPF_PATIENCE": "10", "RAMA_EBPF_DIFFERENTIAL_PAIRS": "1000", "RAMA_EBPF_FLOWS": "40"}
_TIMEOUT = 5400.0
_RESULTS = CACHE / "kernels/results"

_TEXT = """\
# Kernels

Written by `make kernels`. Do not edit.

{features}
In brackets: how many tests passed. A kernel on which one fails fails the run. "Not run" is what a quick run leaves out
(`RAMA_EBPF_QUICK=1 make kernels`): tests that start whole proxies, each of which compiles for a minute or two under
emulation.

The verifier's limit is 1,000,000 instructions. What it walked:

{programs}
{times}
The host's kernel ran on the host: {cpus} CPUs, shared with whatever else they did. The others are Debian's packages,
booted in QEMU without KVM: one emulated CPU, no network but the loopback and namespaces, the host's files read-only.
There the differential test compares {pairs} packets (on the host {host_pairs}), and {flows} random flows go through
each relay (on the host 250).

| kernel | package |
|---|---|
{packages}
Kernels before 6.1 were not run. What each hook does: [architecture.md](architecture.md).
"""


@dataclass(frozen=True)
class Run:
    """What one kernel did."""

    release: str
    package: str
    date: str
    seconds: float
    boot: float | None
    quick: bool
    junit: str

    @property
    def outcomes(self) -> dict[str, Outcome]:
        return outcomes(self.junit)[0]

    @property
    def programs(self) -> dict[str, str]:
        return outcomes(self.junit)[1]

    @property
    def green(self) -> bool:
        return not any(outcome.failed for outcome in self.outcomes.values()) and self._ran_all()

    def _ran_all(self) -> bool:
        return all(self.outcomes[feature.name].passed for feature in FEATURES if not (self.quick and feature.starts))

    def keep(self) -> None:
        _RESULTS.mkdir(parents=True, exist_ok=True)
        (_RESULTS / f"{self.release}.json").write_text(json.dumps(asdict(self)), encoding="utf-8")


def _kept() -> list[Run]:
    """What is there, the oldest kernel first."""
    runs = [Run(**json.loads(path.read_text(encoding="utf-8"))) for path in _RESULTS.glob("*.json")]
    return sorted(runs, key=lambda run: [int(number) for number in re.findall(r"\d+", run.release)])


def _command(report: str, timeout: int, *, quick: bool = False) -> list[str]:
    tests = [test for feature in FEATURES if not (quick and feature.starts) for test in feature.tests]
    options = ["-p", "no:cacheprovider", "-q", f"--timeout={timeout}", f"--junitxml={report}", "--durations=8"]
    return [sys.executable, "-m", "pytest", *options, *tests]


def _on_host() -> Run:
    with tempfile.TemporaryDirectory(prefix="rama-ebpf-kernels-") as made:
        report = Path(made) / "junit.xml"
        began = time.monotonic()
        subprocess.run(_command(str(report), 600), cwd=ROOT, check=False)
        if not report.exists():
            raise guest.GuestFailed("pytest left no report on the host")
        seconds = time.monotonic() - began
        return Run(platform.release(), "the host's", _today(), seconds, None, False, report.read_text(encoding="utf-8"))


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _in_guest(package: str) -> Run:
    kernel = fetch(package)
    quick = bool(os.environ.get("RAMA_EBPF_QUICK"))
    environment = " ".join(f"{name}={value}" for name, value in _EMULATED.items())
    command = f"cut -d. -f1 /proc/uptime >/run/guest/boot; {environment} " + shlex.join(
        _command("/run/guest/junit.xml", 1200, quick=quick)
    )
    result = guest.run(kernel, command, ROOT, timeout=_TIMEOUT)
    logs = CACHE / "kernels" / f"{kernel.release}.log"
    logs.write_text(result.output, encoding="utf-8")
    print(result.output, flush=True)
    if "junit.xml" not in result.files:
        raise guest.GuestFailed(f"pytest left no report on {kernel.release}; its output is {logs}")
    boot = float(result.files["boot"])
    return Run(kernel.release, package, _today(), result.seconds, boot, quick, result.files["junit.xml"])


def _document(runs: list[Run]) -> str:
    columns = [run.release for run in runs]
    programs = dict.fromkeys(name for run in runs for name in run.programs)
    times = {
        "date": [run.date for run in runs],
        "boot to a shell, s": [f"{run.boot:.0f}" if run.boot else "–" for run in runs],
        "whole run, s": [f"{run.seconds:.0f}" for run in runs],
    }
    return _TEXT.format(
        features=table("", columns, {f.name: [run.outcomes[f.name] for run in runs] for f in FEATURES}),
        programs=table("program", columns, {p: [f"{int(run.programs.get(p, 0)):,}" for run in runs] for p in programs}),
        times=table("", columns, times),
        packages="".join(f"| {run.release} | {run.package} |\n" for run in runs),
        cpus=os.cpu_count(),
        pairs=_EMULATED["RAMA_EBPF_DIFFERENTIAL_PAIRS"],
        host_pairs=os.environ.get("RAMA_EBPF_DIFFERENTIAL_PAIRS", "20000"),
        flows=_EMULATED["RAMA_EBPF_FLOWS"],
    )


def main(arguments: list[str]) -> int:
    """Run, print, write. Returns the exit code."""
    try:
        require("kernels")
        for which in arguments or ["host", *PACKAGES]:
            print(f"== {which}", flush=True)
            (_on_host() if which == "host" else _in_guest(which)).keep()
    except Missing as error:
        print(f"kernels: this machine lacks something:\n{error}", file=sys.stderr)
        return 3
    except guest.GuestFailed as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    runs = _kept()
    DOCUMENT.write_text(_document(runs), encoding="utf-8")
    print(f"written: {DOCUMENT.relative_to(ROOT)}")
    for run in runs:
        for outcome in run.outcomes.values():
            for test in outcome.failed:
                print(f"{run.release}: failed: {test}", file=sys.stderr)
    return 0 if all(run.green for run in runs) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

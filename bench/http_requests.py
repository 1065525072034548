"""Requests and CONNECT set-ups per second through HTTP proxies: rate, p50, p99 and CPU time of each.

``python -m bench.http_requests forward|reverse|connect [--seconds 4] [--rounds 5] [--connections 32] [--size 1024]``.
The proxy has one CPU, load and origin the other. Rounds take turns, so that what else the machine does hits all alike;
shown are medians, and the median of the rounds' ratios to ours with their range. ``kept`` is over kept connections,
``close`` with a new one for each request, ``layers`` is ours with metrics and an access line a request. ``--only ours
squid rama`` takes some. As root it takes precedence over the other sessions of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from .http_servers import LOAD_CPU, PROXIES, Contestant, compiled, echo, origin, serving

_SCRIPT = """
wrk.method = "GET"
wrk.headers["Host"] = "127.0.0.1:{origin}"
{close}
request = function() return wrk.format("GET", "{target}") end
"""


@dataclass
class Result:
    """What one round measured: per second, milliseconds, CPU microseconds of each. ``failed`` are other answers and
    none, ``closed`` connections that were closed behind a response that did not say so."""

    rate: float
    p50: float
    p99: float
    cpu: float
    failed: int
    closed: int = 0


def _milliseconds(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)(us|ms|s|m)", text)
    assert match is not None, text
    return float(match[1]) * {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000}[match[2]]


def _found(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None, text
    return match


def _requests(proxy: Contestant, script: str, seconds: float, connections: int) -> Result:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        before = proxy.cpu()
        options = ["-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", file.name]
        command = ["taskset", "-c", LOAD_CPU, "wrk", *options, f"http://127.0.0.1:{proxy.port}"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = proxy.cpu() - before
    count = int(_found(r"(\d+) requests in", out)[1])
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", out)
    statuses = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    connect, read, write, timeout = map(int, errors.groups()) if errors else (0, 0, 0, 0)
    failed = connect + write + timeout + (int(statuses[1]) if statuses else 0)
    return Result(
        float(_found(r"Requests/sec:\s+([0-9.]+)", out)[1]),
        _milliseconds(_found(r"^\s+50%\s+(\S+)", out)[1]),
        _milliseconds(_found(r"^\s+99%\s+(\S+)", out)[1]),
        used / max(count, 1) * 1e6,
        failed,
        read,
    )


def _connects(proxy: Contestant, program: Path, target: int, seconds: float, connections: int) -> Result:
    before = proxy.cpu()
    where = [f"127.0.0.1:{proxy.port}", str(connections), str(seconds), f"127.0.0.1:{target}"]
    command = ["taskset", "-c", LOAD_CPU, str(program), *where]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    used = proxy.cpu() - before
    return Result(told["rate"], told["p50"], told["p99"], used / (told["rate"] * seconds) * 1e6, told["failed"])


def _measure(kind: str, options: argparse.Namespace) -> dict[tuple[str, str], list[Result]]:
    results: defaultdict[tuple[str, str], list[Result]] = defaultdict(list)
    names = [name for name in PROXIES[kind] if options.only is None or name in options.only]
    with tempfile.TemporaryDirectory() as directory:
        program = compiled("connect", Path(directory)) if kind == "connect" else Path()
        with echo(Path(directory)) if kind == "connect" else origin(options.size) as server:
            for _ in range(options.rounds):
                for name in list(names):
                    try:
                        with serving(name, kind, server.port) as proxy:
                            if kind == "connect":
                                _connects(proxy, program, server.port, 0.5, options.connections)  # warm
                                told = _connects(proxy, program, server.port, options.seconds, options.connections)
                                results[name, "connect"].append(told)
                                continue
                            for mode in ("kept", "close"):
                                target = f"http://127.0.0.1:{server.port}/x" if kind == "forward" else "/x"
                                close = 'wrk.headers["Connection"] = "close"' if mode == "close" else ""
                                script = _SCRIPT.format(origin=server.port, target=target, close=close)
                                _requests(proxy, script, 1, options.connections)  # warm
                                told = _requests(proxy, script, options.seconds, options.connections)
                                results[name, mode].append(told)
                    except FileNotFoundError as error:
                        print(f"left out: {error}")
                        names.remove(name)
    return dict(results)


def _show(results: dict[tuple[str, str], list[Result]]) -> None:
    columns = f"{'per s':>8}{'p50 ms':>8}{'p99 ms':>8}{'CPU us':>8}{'failed':>7}{'closed':>8}"
    print(f"{'':11}{'mode':>8}{columns}  ours/this (range)")
    for (name, mode), rounds in results.items():

        def middle(field: str, rounds: list[Result] = rounds) -> float:
            return statistics.median(getattr(result, field) for result in rounds)

        ours = results.get(("ours", mode), [])
        ratios = [a.rate / b.rate for a, b in zip(ours, rounds, strict=False)]
        ratio = f"{statistics.median(ratios):8.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
        print(
            f"{name:11}{mode:>8}{middle('rate'):8.0f}{middle('p50'):8.2f}{middle('p99'):8.2f}{middle('cpu'):8.0f}"
            f"{sum(result.failed for result in rounds):7}{sum(result.closed for result in rounds):8}{ratio}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(PROXIES))
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--size", type=int, default=1024, help="of the answers, in bytes")
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    if os.geteuid() == 0:
        Path("/proc/self/autogroup").write_text("-20")
    results = _measure(options.kind, options)
    what = "" if options.kind == "connect" else f", {options.size} bytes"
    print(f"{options.kind}: {options.connections} at a time{what}, {options.rounds} rounds of {options.seconds:g} s")
    _show(results)


if __name__ == "__main__":
    main()

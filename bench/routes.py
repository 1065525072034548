"""What a decision costs among many routes: ``python -m bench.routes [--routes 10000] [--suffixes 100000]``.

Prints microseconds for each kind of question, and exits 1 above ``--most`` (5).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from ipaddress import IPv4Address, IPv4Network

from rama_ebpf.routes import Question, Route, RouteTable
from rama_ebpf.routes.model import Protocol


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--routes", type=int, default=10_000)
    parser.add_argument("--suffixes", type=int, default=100_000)
    parser.add_argument("--most", type=float, default=5.0, help="microseconds that a decision may take")
    args = parser.parse_args()
    each, rng = args.suffixes // args.routes, random.Random(1)
    routes = [
        Route(
            f"r{number}",
            "direct",
            hosts=tuple(f"*.h{number}x{name}.example" for name in range(each)),
            networks=(IPv4Network((0x0A000000 + number * 256, 24)),),
        )
        for number in range(args.routes)
    ]
    asked = {
        "name, by suffix": [
            Question(443, host=f"www.a.h{rng.randrange(args.routes)}x{rng.randrange(each)}.example")
            for _ in range(5000)
        ],
        "name, none": [Question(443, host="no.such.name.test") for _ in range(5000)],
        "address": [Question(443, ip=IPv4Address(0x0A000000 + rng.randrange(args.routes * 256))) for _ in range(5000)],
    }
    worst = 0.0
    for what, more in (
        ("targets alone", ()),
        ("and users, ports, clients", (Route("all", "direct", users=("tom",), clients=(IPv4Network("10.0.0.0/8"),)),)),
    ):
        begun = time.perf_counter()
        table = RouteTable([*more, *routes, Route("rest", "direct", protocols=tuple(Protocol))])
        compiled = time.perf_counter() - begun
        for kind, questions in asked.items():
            taken = []
            for _ in range(5):
                begun = time.perf_counter()
                for question in questions:
                    table.decide(question)
                taken.append((time.perf_counter() - begun) / len(questions) * 1e6)
            worst = max(worst, min(taken))
            print(f"{what:28}{kind:18}{min(taken):6.2f} us  (compiled in {compiled:.2f} s)")
    return 0 if worst <= args.most else 1


if __name__ == "__main__":
    sys.exit(main())

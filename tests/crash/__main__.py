"""``python -m tests.crash [NAME…]``: try all points of all operations, or of those whose names contain one of NAME."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from pathlib import Path

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from ..lab import Lab
from .forkserver import CommandRunner
from .operations import OPERATIONS, write_files
from .points import Trial
from .scene import Scene
from .server import ServerTrial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="a part: see points.points")
    parser.add_argument("--no-restarts", action="store_true")
    args = parser.parse_args()
    name = f"test-{os.getpid()}-crash"
    with tempfile.TemporaryDirectory(prefix="crash-") as text, Lab() as lab:
        directory = Path(text)
        os.environ["RAMA_EBPF_STATE_DIR"] = f"{directory}/state"
        (directory / "state").mkdir()
        os.environ["PYTHONPATH"] = os.getcwd()
        os.chdir(directory)
        write_files(directory)
        scene = Scene(lab.host("proxy"), name)
        try:
            scene.proxy.start()
            with CommandRunner(name, scene.roots) as runner:
                trial = Trial(scene, runner, directory, restarts=not args.no_restarts)
                trial.begin()
                for operation in OPERATIONS:
                    if args.names and not any(part in operation.name for part in args.names):
                        continue
                    begun, tried, faults = time.monotonic(), trial.tried, len(trial.faults)
                    trial.run(operation, every=args.every)
                    seconds = time.monotonic() - begun
                    tried, afterwards = trial.tried - tried, trial.seconds.pop("afterwards", 0)
                    print(
                        f"{operation.name}: {tried} points, {seconds:.1f} s, {afterwards:.1f} of it afterwards",
                        flush=True,
                    )
                    for fault in trial.faults[faults:]:
                        print(f"  FAULT {fault}", flush=True)
            server = ServerTrial(scene, directory)
            for name_, run in (
                ("start", server.start),
                ("reload", server.reload),
                ("stop that keeps", functools.partial(server.stop, persist=True)),
                ("stop", functools.partial(server.stop, persist=False)),
            ):
                if args.names and not any(part in f"server {name_}" for part in args.names):
                    continue
                begun, tried, faults = time.monotonic(), server.tried, len(server.faults)
                run(every=args.every)
                print(f"{name_}: {server.tried - tried} points, {time.monotonic() - begun:.1f} s", flush=True)
                for fault in server.faults[faults:]:
                    print(f"  FAULT {fault}", flush=True)
        finally:
            scene.proxy.end()
            unload(Instance(name))
    faults = len(trial.faults) + len(server.faults)
    print(
        f"{trial.tried + server.tried} points, {server.tried} of them of the server, {trial.restarted} states started "
        f"from after a crash: {faults} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

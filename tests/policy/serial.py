"""Writers that are stopped and continued at random points give some serial order: ``python -m tests.policy.serial``.

Each is a process that runs one command as the command line does. Others are stopped meanwhile (SIGSTOP), wherever they
are: before the lock, holding it, between two calls. In some rounds the maps are replaced, as a start does that finds
pins of another size. Then the journal says in which order the changes were made, and a policy that is made in this
order in one process has to be the one that is in force, and on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

from rama_ebpf.cli.policy import call
from rama_ebpf.config.policy import load_policy
from rama_ebpf.control.host_policy import HostPolicy
from rama_ebpf.kernel import bpffs
from rama_ebpf.kernel.gate_maps import GateMaps, MapSizes
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import load
from rama_ebpf.policy.image import PolicyImage
from rama_ebpf.policy.kept import KeptPolicy
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.rule import Action, PolicyError, Rule, Settings

__all__ = ["Wrong", "pinned_instance", "run_round"]

_SOURCES = [f"198.18.{n}.0/{24 + n % 3}" for n in range(6)] + ["2001:db8::/48", "2001:db8:1::/64"]
_SIZES = (MapSizes(rules=4096, bans=64, buckets=4096), MapSizes(rules=5120, bans=64, buckets=4096))
_DEFAULTS = ("allow", "drop", "reject")


class Wrong(AssertionError):
    """No serial order gives what was found."""


@dataclass(frozen=True)
class Operation:
    """A command: its method, and what it is given."""

    method: str
    params: dict[str, object]


@contextmanager
def pinned_instance(name: str) -> Iterator[Instance]:
    """An instance with pins, and nobody who serves it."""
    place = Instance(name)
    bpffs.ensure_mounted()
    place.pin_dir.mkdir(parents=True, mode=0o700)
    GateMaps.create(place.pin_dir, _SIZES[0]).close()
    try:
        yield place
    finally:
        bpffs.remove_tree(place.pin_root)


def _operations(pick: random.Random, place: Instance, directory: Path, count: int) -> list[Operation]:
    with KernelStore(place) as store:
        revision = store.revision
    made = []
    for number in range(count):
        kind = pick.random()
        if kind < 0.45:
            action, name = pick.choice(("drop", "reject", "allow")), f"op{pick.getrandbits(60):x}"
            params = {"source": pick.choice(_SOURCES), "action": action, "name": name, "port": pick.choice((None, 443))}
            made.append(Operation("add", params | {"ttl": pick.choice((None, "1h"))}))
        elif kind < 0.75:
            made.append(Operation("remove", {"source": pick.choice(_SOURCES), "port": pick.choice((None, 443))}))
        else:
            path = directory / f"{number}-{pick.getrandbits(60):x}.toml"
            default = f'default = "{pick.choice(_DEFAULTS)}"\n' if pick.random() < 0.5 else ""
            rule = f'[[rules]]\nname = "{path.stem}"\naction = "drop"\nsources = ["{pick.choice(_SOURCES)}"]\n'
            path.write_text(default + rule)
            wanted = revision + pick.randint(0, 3) if pick.random() < 0.3 else None
            made.append(Operation("load", {"path": str(path), "revision": wanted}))
    return made


def _begin(place: Instance, operation: Operation) -> tuple[int, int]:
    """Run a command in a process; return its id, and where it says what came of it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        try:
            said: object = call(place, operation.method, operation.params)["revision"]
        except PolicyError as error:
            said = type(error).__name__
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  # the parent says it
        os.write(writing, json.dumps(f"{type(error).__name__}: {error}").encode())
        os._exit(1)


def run_round(place: Instance, pick: random.Random, directory: Path, *, writers: int, restart: bool) -> int:
    """One round; return how many changes there were. Raises :class:`Wrong`."""
    with KernelStore(place) as store:
        before, seen = store.image(), len(store.journal())
    operations = _operations(pick, place, directory, writers)
    running = {_begin(place, operation): operation for operation in operations}
    swap_at = 0.1 * pick.random() if restart else float("inf")
    try:
        _stop_and_go(pick, [pid for pid, _ in running], swap_at, place)
        said = {operation.params.get("name") or id(operation): _end(*who) for who, operation in running.items()}
    except BaseException:
        for pid, _ in running:
            os.kill(pid, signal.SIGKILL)
        raise
    for operation in operations:
        told = said[operation.params.get("name") or id(operation)]
        if not (isinstance(told, int) or told == "StaleRevision"):
            raise Wrong(f"{operation}: {told}")
    with KernelStore(place) as store:
        after, entries = store.image(), store.journal()[seen:]
    revisions = [entry["revision"] for entry in entries]
    if sorted(revisions) != list(range(before.revision + 1, after.revision + 1)):
        raise Wrong(f"revisions {revisions} after {before.revision} and before {after.revision}")
    for operation in operations:
        stale = said[operation.params.get("name") or id(operation)] == "StaleRevision"
        if operation.method == "load" and operation.params["revision"] is not None and not stale:
            found = [entry["revision"] for entry in entries if entry.get("origin") == operation.params["path"]]
            if found != [operation.params["revision"] + 1]:
                raise Wrong(f"{operation}: loaded at {found}")
    expected = _in_order(before, sorted(entries, key=lambda entry: entry["revision"]))
    on_disk = KeptPolicy(place.state_dir).read()
    for name, found in (("in force", after), ("on disk", on_disk)):
        if found is None or _facts(found) != _facts(expected):
            raise Wrong(f"{name}: {found and _facts(found)}, but in order: {_facts(expected)}")
    return len(entries)


def _stop_and_go(pick: random.Random, pids: list[int], swap_at: float, place: Instance) -> None:
    left, began = set(pids), time.monotonic()
    while left:
        pid = pick.choice(sorted(left))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(pick.random() * 0.01)
        if time.monotonic() - began > swap_at:
            swap_at = float("inf")
            os.kill(pid, signal.SIGCONT)  # it may hold the lock
            _replace_maps(place)
        os.kill(pid, signal.SIGCONT)
        time.sleep(pick.random() * 0.01)
        left -= {one for one in left if os.waitid(os.P_PID, one, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None}


def _end(pid: int, reading: int) -> object:
    with open(reading, "rb") as file:
        said = json.loads(file.read() or b'"nothing"')
    os.waitpid(pid, 0)
    return said


def _replace_maps(place: Instance) -> None:
    """As a start does that finds pins of another size."""
    with GateMaps.open(place.pin_dir) as maps:
        other = next(size for size in _SIZES if size != maps.sizes)
    load(place, sizes=other, keeper=HostPolicy(place)).close(keep_policy=True)


def _in_order(before: PolicyImage, entries: list[dict[str, object]]) -> PolicyImage:
    """The policy that the changes make, one after the other, in this process."""
    model = LocalStore()
    model.put_image(before)
    for entry in entries:
        if entry["what"] == "load":
            policy = load_policy(str(entry["origin"]))
            model.replace(policy.ruleset(Settings()), settings=policy.settings)
            continue
        network, port = ip_network(str(entry["source"])), entry.get("port")
        assert port is None or isinstance(port, int)
        if entry["what"] == "remove":
            model.remove(network, port)
        else:
            model.add(Rule(str(entry["rule"]), (network,), Action[str(entry["action"]).upper()], port))
    return model.image()


def _facts(image: PolicyImage) -> tuple[object, ...]:
    """What does not depend on when it was done."""
    rules = [(rule.name, rule.action, tuple(rule.sources)) for rule in image.ruleset.rules]
    runtime = sorted((str(one.place), one.rule.name, one.rule.action.name) for one in image.runtime)
    return image.revision, image.ruleset.settings.default, rules, runtime


def main() -> int:
    """Run many rounds; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--writers", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pick, changes = random.Random(args.seed), 0
    with ExitStack() as stack:
        import tempfile

        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serial-")))
        os.environ["RAMA_EBPF_STATE_DIR"] = str(directory / "state")
        place = stack.enter_context(pinned_instance(f"serial-{os.getpid()}"))
        for number in range(args.rounds):
            try:
                changes += run_round(place, pick, directory, writers=args.writers, restart=number % 5 == 4)
            except Wrong as error:
                print(f"round {number}, seed {args.seed}: {error}")
                return 1
            if number % 50 == 49:
                print(f"{number + 1} rounds, {changes} changes in some serial order", flush=True)
    print(f"{args.rounds} rounds of {args.writers} writers, {changes} changes: all in some serial order")
    return 0


if __name__ == "__main__":
    sys.exit(main())

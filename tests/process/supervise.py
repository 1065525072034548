"""A process that runs a supervisor, for tests that send it signals: ``python -m tests.process.supervise JSON``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import sys
from pathlib import Path
from typing import Any

import uvloop

from rama_ebpf.control.exposition import MetricsFiles, MetricsServer, supervisor_collector, verdict_collector
from rama_ebpf.core import RamaError
from rama_ebpf.kernel.privileges import UserIds
from rama_ebpf.metrics.directory import MetricsDirectory
from rama_ebpf.process import (
    Listener,
    Nursery,
    Plan,
    Revision,
    Supervisor,
    WorkerObserver,
    WorkerProcess,
    WorkersFailed,
)
from rama_ebpf.process.plan import Json
from rama_ebpf.services.tcp import bind_tcp


def main() -> int:
    """Serve the plan of the first argument; print ``ready`` and the addresses."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    logging.basicConfig(level="DEBUG", format="%(levelname)s supervisor %(message)s")
    with_metrics = options.pop("metrics", False)
    parent = options.pop("parent")
    if "descriptors" in options:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options["descriptors"],) * 2)
        del options["descriptors"]
    names = options.pop("listeners", ["main"])
    sockets = options.pop("sockets", options.get("workers", 2))
    user = options.pop("user", None)
    as_user = None if user is None else UserIds.of(user)
    listeners = []
    for name in names:
        first = bind_tcp("127.0.0.1", 0, reuse_port=True)
        more = [bind_tcp(*first.getsockname(), reuse_port=True) for _ in range(sockets - 1)]
        listeners.append(Listener(name, (first, *more)))

    cleanup = contextlib.ExitStack()
    directory = cleanup.enter_context(MetricsDirectory(parent=parent))
    scraped = bind_tcp("127.0.0.1", 0)
    ports = [listener.sockets[0].getsockname()[1] for listener in listeners] + [scraped.getsockname()[1]]

    def plan() -> Plan:
        override = Path(options["reload_from"]).read_text() if "reload_from" in options else "{}"
        merged = {**options, **json.loads(override or "{}")}
        merged.pop("reload_from", None)
        merged["environment"] = directory.environment if with_metrics else {}
        return Plan(listeners=tuple(listeners), user=None if user is None else UserIds.of(user), **merged)

    class Unguarded:
        """A plan that has nothing around it, on sockets that stay."""

        def __init__(self) -> None:
            self.plan = plan()

        async def enter(self) -> None: ...

        async def abandon(self) -> None: ...

        async def superseded(self) -> None: ...

        async def leave(self) -> None: ...

        def stop(self) -> None:
            for listener in listeners:
                for sock in listener.sockets:
                    sock.close()

    async def prepare() -> Revision:
        return Unguarded()

    class Questions(WorkerObserver):
        def started(self, worker: WorkerProcess) -> None:
            worker.channel.on("sum", lambda body: {"worker": body["from"], "pids": supervisor.pids})
            worker.channel.on("refuse", refuse)

    def refuse(body: Json) -> Json:
        raise RamaError(f"worker {body['from']} may not")

    supervisor: Supervisor

    async def serve() -> None:
        nonlocal supervisor
        verdicts = verdict_collector(lambda: {("ban", "", "drop"): 3, ("rule", "office", "allow"): 5})
        async with Nursery() as nursery:
            supervisor = Supervisor(
                Unguarded(),
                nursery,
                prepare=prepare,
                observers=[Questions(), MetricsFiles(directory)],
                on_ready=lambda: print("ready", json.dumps(ports), flush=True),
            )
            metrics = MetricsServer(
                scraped, directory, [supervisor_collector(supervisor), verdicts], dict, user=as_user
            )
            nursery.keep("serving metrics", metrics.run)
            await supervisor.run()
            metrics.stop()

    try:
        with cleanup, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())
    except WorkersFailed as error:
        print(f"failed {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

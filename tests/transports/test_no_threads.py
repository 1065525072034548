"""Where no thread can be started (pids.max, RLIMIT_NPROC) clients are refused in a way that invites another try."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import asyncio, logging, os, resource, sys, tempfile, threading
from pathlib import Path

from rama_ebpf.core.errors import Busy
from rama_ebpf.layers.check_queue import CheckQueue
from rama_ebpf.services.resolver import DnsResolver, ResolveError, SystemResolver

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
directory = Path(tempfile.mkdtemp())
os.chmod(directory, 0o777)
hosts, conf = directory / "hosts", directory / "resolv.conf"
hosts.write_text("192.0.2.1 a.test\\n")
conf.write_text("nameserver 127.0.0.1\\n")
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
try:
    threading.Thread(target=int).start()
except RuntimeError:
    pass
else:
    sys.exit("threads can be started: there is nothing to see")


async def main():
    now = 0.0
    resolver = DnsResolver(hosts=str(hosts), resolv_conf=str(conf), clock=lambda: now)
    print(*await resolver.resolve("a.test"))
    for _ in range(3):
        hosts.unlink()
        hosts.write_text("192.0.2.2 a.test\\n")
        now += 60.0
        print(*await resolver.resolve("a.test"))
    try:
        await CheckQueue().run("source", lambda: True)
    except Busy as error:
        print("busy", error.retry_after)
    try:
        await SystemResolver().resolve("localhost")
    except ResolveError as error:
        print("temporary", error.temporary)
    resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
    while str((await resolver.resolve("a.test"))[0]) != "192.0.2.2":  # it is read when there are threads again
        now += 60.0
        await asyncio.sleep(0.01)
    resolver.close()


asyncio.run(main())
"""


def test_without_threads_names_and_passwords_are_busy_and_nothing_fails() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert [line for line in lines if line not in warnings] == ["192.0.2.1"] * 4 + ["busy 2.0", "temporary True"]
    assert len(warnings) == 1
    assert "the hosts file has changed and cannot be read again yet" in warnings[0]

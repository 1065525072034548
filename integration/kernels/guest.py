"""Run a command in a virtual machine that has the host's files, read-only, under a scratch layer."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ..require import SCRATCH
from .packages import Kernel

__all__ = ["GuestFailed", "Result", "run"]

_START = """\
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mkdir -p /usr/lib/modules
ln -sfn {modules} /usr/lib/modules/{release}
ip link set lo up
cd {directory}
{{ {command}; }} >/run/guest/output 2>&1
echo $? >/run/guest/code
sync
/bin/busybox poweroff -f
"""


class GuestFailed(RuntimeError):
    """The machine did not boot, hung, or ended without the command's exit code. The text has the end of its console."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the command."""

    code: int
    output: str
    seconds: float
    files: dict[str, str]
    """Text of the files that it left in ``/run/guest``."""


def run(kernel: Kernel, command: str, directory: Path, *, timeout: float, memory: int = 3072) -> Result:
    """Boot ``kernel``, run a shell command in ``directory`` as root, and power off.

    It sees the host's file system; what it writes there is gone with the machine, except in ``/run/guest``. There is no
    network but the loopback. ``timeout`` is in seconds, ``memory`` in MiB. Raises :class:`GuestFailed`.
    """
    share = Path(tempfile.mkdtemp(prefix="rama-ebpf-guest-", dir=SCRATCH))
    try:
        start = _START.format(
            modules=shlex.quote(str(kernel.modules)),
            release=kernel.release,
            directory=shlex.quote(str(directory)),
            command=command,
        )
        (share / "start").write_text(start, encoding="utf-8")
        began = time.monotonic()
        console = _boot(kernel, share, timeout, memory)
        seconds = time.monotonic() - began
        files = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in share.iterdir()}
        if "code" not in files:
            last = "\n".join((console.splitlines() + files.get("output", "").splitlines())[-40:])
            raise GuestFailed(f"kernel {kernel.release} ended without a result after {seconds:.0f} s:\n{last}")
        return Result(int(files["code"]), files["output"], seconds, files)
    finally:
        shutil.rmtree(share)


def _boot(kernel: Kernel, share: Path, timeout: float, memory: int) -> str:
    # Nehalem: KVM guests with newer models hang on hosts that are guests themselves, and emulation of it is quick.
    command = [
        *("nice", "-n", "10", "setpriv", "--pdeathsig", "KILL"),  # the machine ends with us
        *("qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-machine", "q35,sata=off,smbus=off,i8042=off", "-cpu", "Nehalem", "-smp", "1", "-m", str(memory)),
        *("-accel", "tcg", "-serial", "stdio", "-nic", "none"),
        *("-kernel", str(kernel.image), "-initrd", str(kernel.initramfs)),
        *("-append", "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr clocksource=hpet"),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        *("-virtfs", f"local,path={share},mount_tag=guest,security_model=none"),
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        console = (expired.stdout or b"").decode(errors="replace")
        return f"{console}\nnot done after {timeout:g} s"
    return done.stdout + done.stderr

"""What a suite needs from the machine: say all that is missing, and how to get it, before anything is begun.

``python -m integration.require docker`` prints what is missing and exits 3, or prints nothing and exits 0; of several
suites it prints what is missing for any.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["CACHE", "SCRATCH", "SUITES", "Missing", "require"]

CACHE = Path(__file__).resolve().parent.parent / ".cache"
"""What takes long to make and is made once: images, kernels, boxes. ``make clean`` removes it."""

SCRATCH = Path("/var/tmp")
"""Where large things live while a suite runs: on disk, unlike /tmp on many hosts."""

_GIB = 1 << 30


class Missing(RuntimeError):
    """The machine lacks something. The text has one line for each thing, with the way to get it."""


def _root() -> str | None:
    return None if os.geteuid() == 0 else "root is needed: run it with sudo"


def _command(name: str, packages: str) -> Callable[[], str | None]:
    def check() -> str | None:
        return None if shutil.which(name) else f"{name} is not installed: {packages}"

    return check


def _disk(where: Path, gib: int) -> Callable[[], str | None]:
    def check() -> str | None:
        existing = next(path for path in (where, *where.parents) if path.exists())
        free = shutil.disk_usage(existing).free / _GIB
        return None if free >= gib else f"{existing} has {free:.1f} GiB free, {gib} are needed: make room"

    return check


def _kvm() -> str | None:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return None
    return (
        "/dev/kvm cannot be used: switch on (nested) virtualisation for this host and load kvm_intel or kvm_amd, or "
        "leave RAMA_EBPF_EMULATE unset, and the machine is emulated in software"
    )


_BOX = (
    _root,
    _command("mmdebstrap", "apt install mmdebstrap"),
    _command("mke2fs", "apt install e2fsprogs"),
    _command("qemu-img", "apt install qemu-utils (Fedora: qemu-img)"),
    _command("busybox", "apt install busybox-static (Fedora: busybox)"),
    _command("cpio", "apt install cpio"),
    _command("modprobe", "apt install kmod"),
    _command("vagrant", "apt install vagrant"),  # its well-known key goes into the box
    _disk(SCRATCH, 10),
    _disk(CACHE, 4),
)

SUITES: dict[str, Sequence[Callable[[], str | None]]] = {
    "docker": (
        _root,
        _command("dockerd", "apt install docker.io (Fedora: dnf install moby-engine)"),
        _command("docker", "apt install docker.io (Debian 13 and Fedora: docker-cli)"),
        _command("mmdebstrap", "apt install mmdebstrap"),
        _command("unshare", "apt install util-linux"),
        _disk(SCRATCH, 3),
        _disk(CACHE, 1),
    ),
    "kernels": (
        _root,
        _command("qemu-system-x86_64", "apt install qemu-system-x86 (Fedora: qemu-system-x86-core)"),
        _command(
            "apt-get", "the kernels are Debian's: run it on Debian, or give kernels that are unpacked below .cache"
        ),
        _command("busybox", "apt install busybox-static"),
        _command("cpio", "apt install cpio"),
        _command("modprobe", "apt install kmod"),
        _disk(CACHE, 2),
    ),
    "box": _BOX,
    "kvm": (_kvm,),
    "vagrant": (
        *_BOX,
        _command("libvirtd", "apt install libvirt-daemon-system libvirt-daemon-driver-qemu"),
        _command("virsh", "apt install libvirt-clients"),
        _command("dnsmasq", "apt install dnsmasq-base"),
        _command("qemu-system-x86_64", "apt install qemu-system-x86"),
        _command("rsync", "apt install rsync"),
        _command("ssh", "apt install openssh-client"),
    ),
}


def require(*suites: str) -> None:
    """Raise :class:`Missing` unless the machine has all that the suites need. Raises KeyError for an unknown suite."""
    checks = dict.fromkeys(check for suite in suites for check in SUITES[suite])
    missing = [text for check in checks if (text := check()) is not None]
    if missing:
        raise Missing("\n".join(missing))


if __name__ == "__main__":
    try:
        require(*sys.argv[1:])
    except Missing as error:
        print(f"{' '.join(sys.argv[1:])}: this machine lacks something:\n{error}", file=sys.stderr)
        raise SystemExit(3) from None

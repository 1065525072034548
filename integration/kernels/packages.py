"""Debian's kernels, unpacked below the cache and made ready for a fast boot. Nothing is installed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..require import CACHE, Missing
from .image import run, unpack_image, write_initramfs

__all__ = ["Kernel", "fetch"]

# What the initial file system loads, in the order of need: the paths to the host's files, and the overlay on them.
_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")

_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /host /rw /new
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in $(cat /modules.order); do insmod /modules/$module || echo "cannot load $module"; done
nine=trans=virtio,version=9p2000.L,msize=524288
mount -t 9p -o $nine,cache=loose,ro host /host || poweroff -f
mount -t tmpfs rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /new || poweroff -f
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts pts /new/dev/pts
mount -t tmpfs shm /new/dev/shm
mount -t tmpfs run /new/run
mount -t tmpfs tmp /new/tmp
mount -t cgroup2 cgroup /new/sys/fs/cgroup
mount -t bpf bpf /new/sys/fs/bpf
mkdir /new/run/guest
mount -t 9p -o $nine,cache=none guest /new/run/guest || poweroff -f
exec switch_root /new /bin/sh /run/guest/start
"""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted: its release (``uname -r``), ELF image, initial file system, and modules."""

    release: str
    image: Path
    initramfs: Path
    modules: Path


def fetch(package: str) -> Kernel:
    """Download the kernel that a Debian (meta) package stands for. Raises Missing where apt cannot."""
    release = _release(package)
    directory = CACHE / "kernels" / release
    kernel = Kernel(release, directory / "vmlinux", directory / "initramfs", directory / "lib/modules" / release)
    if kernel.initramfs.is_file():
        return kernel
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    needs = "the kernel cannot be downloaded: Debian's mirror must be reachable (and the lists fresh: apt-get update)"
    run("apt-get", "download", "--quiet", f"linux-image-{release}", cwd=directory, needs=needs)
    deb = next(directory.glob("*.deb"))
    run("dpkg-deb", "--extract", str(deb), str(directory))
    deb.unlink()
    run("depmod", "--basedir", str(directory), release)
    kernel.image.write_bytes(unpack_image((directory / f"boot/vmlinuz-{release}").read_bytes()))
    write_initramfs(kernel.initramfs, directory, release, _MODULES, _INIT)
    return kernel


def _release(package: str) -> str:
    shown = run("apt-cache", "depends", "--important", package)
    names = [line.split("linux-image-", 1)[1] for line in shown.splitlines() if "Depends: linux-image-" in line]
    if not names:
        raise Missing(f"{package} is in no package list: apt-get update, with bookworm and bookworm-security in it")
    return names[0]

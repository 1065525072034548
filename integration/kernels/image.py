"""What a virtual machine boots from: the kernel's ELF image, and a small initial file system."""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from ..require import Missing

__all__ = ["run", "unpack_image", "write_initramfs"]


def run(*command: str, cwd: Path | None = None, needs: str = "") -> str:
    """Run a command and return what it prints.

    Raises Missing with the end of what it complained about, and what it ``needs`` of the outside.
    """
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = "\n".join(result.stderr.strip().splitlines()[-5:])
        hint = f"\n{needs}" if needs else ""
        raise Missing(f"{' '.join(command)[:200]} failed with status {result.returncode}:\n{last}{hint}")
    return result.stdout


def unpack_image(image: bytes) -> bytes:
    """Return the ELF image inside a bzImage (Linux ``Documentation/arch/x86/boot.rst``).

    It boots through the PVH entry without decompressing itself, which takes half a minute under emulation.
    """
    if image[0x202:0x206] != b"HdrS":
        raise ValueError("not a bzImage")
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    payload = image[start : start + length]
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        # The decompressed size follows the frame: zstd writes the frame and complains about the rest.
        return subprocess.run(["zstd", "--decompress"], input=payload[:-4], capture_output=True, check=True).stdout
    raise ValueError(f"the kernel is compressed in an unknown way: {payload[:8].hex()}")


def write_initramfs(target: Path, base: Path, release: str, modules: Sequence[str], init: str) -> None:
    """Write an initial file system of busybox, some modules with all that they need, and a script that loads them.

    ``base`` is the directory that has ``lib/modules/RELEASE``, with the files of depmod(8). The script finds the
    names in ``/modules.order`` and the files in ``/modules``.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise Missing("busybox is not installed: apt install busybox-static")
    with tempfile.TemporaryDirectory(prefix="initramfs-") as made:
        tree = Path(made)
        for directory in ("bin", "modules"):
            (tree / directory).mkdir()
        shutil.copy(busybox, tree / "bin/busybox")
        order: list[str] = []
        for module in modules:
            options = ("--dirname", str(base), "--set-version", release, "--show-depends")
            for line in run("modprobe", *options, module).splitlines():
                kind, _, path = line.strip().partition(" ")
                name = Path(path).name.removesuffix(".xz")
                if kind != "insmod" or name in order:
                    continue
                order.append(name)
                content = Path(path).read_bytes()
                (tree / "modules" / name).write_bytes(lzma.decompress(content) if path.endswith(".xz") else content)
        (tree / "modules.order").write_text("\n".join(order) + "\n", encoding="ascii")
        (tree / "init").write_text(init, encoding="ascii")
        (tree / "init").chmod(0o755)
        files = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*"))) + "\n"
        unfinished = target.with_name(target.name + ".new")
        with unfinished.open("wb") as out:
            command = ["cpio", "--create", "--quiet", "--format=newc"]
            subprocess.run(command, input=files.encode(), stdout=out, cwd=tree, check=True)
    unfinished.rename(target)

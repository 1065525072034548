"""The images, made from Debian packages and wheels: no registry is asked.

``base`` has the distribution's packages (those of ``packaging/apt-run.txt``, and a packet capture). ``proxy`` is
``packaging/Dockerfile`` on top of it, built with the network closed.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import docker

from ..require import CACHE, Missing

__all__ = ["BASE", "PROXY", "build"]

BASE, PROXY = "rama-ebpf-base", "rama-ebpf"

_ROOT = Path(__file__).resolve().parent.parent.parent
_SUITE, _PYTHON = "bookworm", "3.11"
_PEER_PACKAGES = ("tcpdump",)


def build(client: docker.DockerClient, scratch: Path) -> None:
    """Make both images in the daemon. Raises :class:`Missing` where packages or wheels cannot be had."""
    client.api.import_image_from_file(str(_base_tar()), repository=BASE, tag="latest")
    context = scratch / "context"
    _write_context(context)
    client.images.build(
        path=str(context),
        dockerfile="packaging/Dockerfile",
        buildargs={"BASE": BASE},
        tag=PROXY,
        network_mode="none",
        rm=True,
    )
    shutil.rmtree(context)


def _packages() -> list[str]:
    lines = (_ROOT / "packaging/apt-run.txt").read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line and not line.startswith("#")]


def _base_tar() -> Path:
    packages = [*_packages(), *_PEER_PACKAGES]
    key = hashlib.sha256(" ".join([_SUITE, *packages]).encode()).hexdigest()[:12]
    tar = CACHE / f"{BASE}-{key}.tar"
    if tar.is_file():
        return tar
    CACHE.mkdir(exist_ok=True)
    unfinished = tar.with_suffix(".new.tar")
    command = [
        *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}"),
        *(f"--dpkgopt=path-exclude=/usr/share/{unread}/*" for unread in ("doc", "man", "locale")),
        *(_SUITE, str(unfinished)),
    ]
    _run(command, "the packages of the image cannot be fetched: Debian's mirror must be reachable")
    return unfinished.rename(tar)


def _write_context(context: Path) -> None:
    """Write a build context: the Dockerfile, what it reads, and wheels of this project and all that it needs."""
    (context / "packaging").mkdir(parents=True)
    for name in ("Dockerfile", "apt-run.txt"):
        shutil.copy(_ROOT / "packaging" / name, context / "packaging")
    wheels = context / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = context / "source"  # a copy, so that building leaves nothing in the tree and takes nothing stale from it
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("rama_ebpf", "bpf"):
        shutil.copytree(_ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, source)
    what = "the Python packages of the image cannot be fetched (PyPI must be reachable)"
    _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(source)], what)
    shutil.rmtree(source)
    needs = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    machine = platform.machine()
    platforms = [f"manylinux{glibc}_{machine}" for glibc in ("2014", "_2_17", "_2_28", "_2_34")]
    _run(
        [
            *(*pip, "download", "--only-binary=:all:", f"--python-version={_PYTHON}", "--implementation=cp"),
            *(f"--platform={name}" for name in platforms),
            *("--dest", str(wheels), *needs),
        ],
        what,
    )


def _run(command: list[str], missing: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise Missing(f"{missing}:\n" + "\n".join(result.stderr.strip().splitlines()[-10:]))

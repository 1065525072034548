"""What BCC compiles against where no kernel headers are installed: a stub tree of a few small files.

BCC carries its own ``bpf.h`` and asks a kernel build tree for very little. Programs that use UAPI types only compile
against these stubs and the libc's UAPI headers on any host, ten times faster than against a real build tree.
"""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

__all__ = ["cflags", "included", "stub_tree", "uapi_present", "write_stub_tree"]

_KCONFIG = """\
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef short s16;
typedef int s32;
typedef long long s64;
typedef _Bool bool;
typedef unsigned long uintptr_t;
typedef __SIZE_TYPE__ size_t;
#define NULL ((void *)0)
#define CONFIG_BPF_SYSCALL 1
"""

_EMPTY = (
    "include/generated/autoconf.h",
    "include/linux/log2.h",
    "include/asm/page.h",
    "include/linux/bpf.h",
    "include/uapi/linux/bpf.h",
)

# BCC includes these by their path in a kernel tree.
_UAPI = ("if_packet", "if_ether", "ptrace")


def _include_dirs() -> list[Path]:
    multiarch = sysconfig.get_config_var("MULTIARCH")
    dirs = [Path("/usr/include")]
    return [dirs[0] / str(multiarch), *dirs] if multiarch else dirs


def uapi_present() -> bool:
    """Whether the libc's copy of the kernel's UAPI headers is installed."""
    return Path("/usr/include/linux/if_ether.h").is_file()


def included(source: str) -> list[Path]:
    """Return the UAPI headers that a source names in ``#include <…>`` lines, as far as they are installed."""
    names = re.findall(r"^#include <([^>]+)>", source, flags=re.M)
    found = (next((d / name for d in _include_dirs() if (d / name).is_file()), None) for name in names)
    return [path for path in found if path is not None]


def stub_tree() -> dict[str, str]:
    """Return the stub tree: texts by their paths in it."""
    files = {"include/linux/kconfig.h": _KCONFIG} | dict.fromkeys(_EMPTY, "")
    return files | {f"include/uapi/linux/{name}.h": f'#include "/usr/include/linux/{name}.h"\n' for name in _UAPI}


def write_stub_tree(root: Path) -> None:
    """Write the stub tree below ``root``; give ``root`` to BCC in BCC_KERNEL_SOURCE."""
    for name, text in stub_tree().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")


def cflags() -> list[str]:
    """Return the compiler flags that let the libc's UAPI headers be found after the stubs."""
    return [flag for directory in _include_dirs() for flag in ("-idirafter", str(directory))]

"""rama_ebpf: the kernel decides who may connect before ``accept(2)``, Python services handle those who got in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .gate import Gate as Gate
    from .gate import SyncGate as SyncGate

__version__ = "0.1.0"
__all__ = ["Gate", "SyncGate", "__version__"]


def __getattr__(name: str) -> object:
    """The gate is imported when it is asked for: the command begins without it."""
    if name in ("Gate", "SyncGate"):
        from . import gate

        return getattr(gate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Patterns of host names; they live in :mod:`rama_ebpf.core.names`, because targets are matched by them too."""

from __future__ import annotations

from ...core.names import NameMap, NameSet

__all__ = ["NameMap", "NameSet"]

"""How long tests wait."""

from __future__ import annotations

import os
from typing import Final

__all__ = ["PATIENCE"]

PATIENCE: Final = float(os.environ.get("RAMA_EBPF_PATIENCE", "1"))
"""How many times longer than on hardware things may take: emulated machines set ``RAMA_EBPF_PATIENCE``."""

"""How the server hands open files to the process that serves metrics: packets over a Unix socket.

The child sends ``{"ask": true, "added": []}``; the server answers with packets of ``{"names": […], "last": false}``,
each with as many descriptors as names. With ``"ask": false`` the child says which files of workers that have ended it
has added up: the server removes these, and answers that with a last packet, too.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FILES_AT_ONCE", "OWN", "PACKET_BYTES"]

FILES_AT_ONCE: Final = 200
"""Descriptors in one packet: the kernel takes 253 (SCM_MAX_FD)."""
PACKET_BYTES: Final = 128 * 1024
OWN: Final = "own"
"""The name of what the server counts itself, as JSON."""
